"""deploy/gateway.toml is the reference of all settings: each stands there, with its default and what it is."""

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from server.config import Section, Settings, _section_type, load_settings

REFERENCE = Path(__file__).parents[2] / "deploy" / "gateway.toml"
LINE = re.compile(r"(?P<unset>#?)(?:\[(?P<section>[a-z_.]+)\]|(?P<key>[a-z_]+) = (?P<rest>.*))")
COMMENT = re.compile(r"\S +# \S")


@dataclass(frozen=True)
class Setting:
    """A line of the file: the value is None where it is commented out."""

    value: Any
    line: str


def written(text: str) -> dict[str, Setting | None]:
    """Dotted name -> the setting, None for a section that is commented out."""
    found: dict[str, Setting | None] = {}
    section = ""
    for line in text.splitlines():
        if match := LINE.fullmatch(line):
            if match["section"]:
                section = match["section"]
                found[section] = None
                continue
            value = None if match["unset"] else tomllib.loads(line)[match["key"]]
            found[f"{section}.{match['key']}"] = Setting(value, line)
    return found


def defaults(section: type[Section], name: str = "") -> Iterator[tuple[str, str, Any]]:
    """Section, key and default of every setting; the default is None where it is unset, or must be given."""
    for key, field in section.model_fields.items():
        if field.exclude:  # it stands in a file of its own
            continue
        if nested := _section_type(field.annotation):
            yield from defaults(nested, f"{name}.{key}" if name else key)
        else:
            yield name, key, default_of(section, key, field)


def default_of(section: type[Section], key: str, field: FieldInfo) -> Any:
    if field.is_required():
        return None
    return section.model_construct().model_dump(mode="json", include={key})[key]


def missing_lines(text: str) -> list[str]:
    """What to change in the file, a line each."""
    found, wrong = written(text), []
    for section, key, default in defaults(Settings):
        if default == {}:  # a table of names that are not ours
            if f"{section}.{key}" not in found:
                wrong.append(f"add the section:  #[{section}.{key}]")
            continue
        setting = found.get(f"{section}.{key}")
        line = (
            f"#{key} = ...  # what it is; unset: ..."
            if default is None
            else f"{key} = {json.dumps(default)}  # what it is"
        )
        if setting is None:
            wrong.append(f"add to [{section}]:  {line}")
        elif setting.value != default:
            wrong.append(f"in [{section}] the default is another:  {line}")
    return wrong


def test_every_setting_is_there_with_its_default() -> None:
    wrong = missing_lines(REFERENCE.read_text())
    assert wrong == [], "\ndeploy/gateway.toml: " + "\ndeploy/gateway.toml: ".join(wrong)


def test_what_is_missing_or_differs_is_said_by_the_line() -> None:
    text = REFERENCE.read_text()
    lines = (r"port = 8000.*", r"#served_name.*", r"#\[engine\.vllm\]", r"max_tools = .*")
    spoiled = ["", "", "", "max_tools = 7  # of one request"]
    for line, instead in zip(lines, spoiled, strict=True):
        text, count = re.subn(rf"(?m)^{line}$", instead, text)
        assert count == 1, line
    assert missing_lines(text) == [
        "add to [server]:  port = 8000  # what it is",
        "add to [server]:  #served_name = ...  # what it is; unset: ...",
        "add the section:  #[engine.vllm]",
        "in [tools] the default is another:  max_tools = 128  # what it is",
    ]


def test_the_file_loads_and_changes_nothing() -> None:
    assert load_settings(REFERENCE, {}, {}) == Settings()


def test_what_is_commented_out_is_a_setting_too(tmp_path: Path) -> None:
    """The examples of unset settings are allowed, and none of them is one that no longer exists."""
    lines = [
        line[1:] if LINE.fullmatch(line) and line[0] == "#" else line for line in REFERENCE.read_text().splitlines()
    ]
    file = tmp_path / "gateway.toml"
    file.write_text("\n".join(lines).replace("/etc/deltaworks", str(tmp_path)))
    for keys in ("api-keys", "admin-keys"):
        (tmp_path / keys).write_text("key\n")
    (tmp_path / "keys.toml").write_text(f'[[keys]]\nid = "team"\nhash = "sha256:{"0" * 64}"\n')
    settings = load_settings(file, {}, {})
    assert settings.steering.default is not None
    assert settings.engine.vllm["tensor_parallel_size"] == 2


def test_every_setting_says_what_it_is() -> None:
    settings = [setting for setting in written(REFERENCE.read_text()).values() if setting is not None]
    assert len(settings) > 50
    assert [setting.line for setting in settings if not COMMENT.search(setting.line)] == []
