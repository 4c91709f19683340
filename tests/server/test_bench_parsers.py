"""The leaderboard's cases: read in its own form, written down, read again, and asked of a scripted server."""

import json
from pathlib import Path

import pytest

from server.bench.parsers import FORMATS, CasesError, read_cases, reread, round_trips, tool_of, written
from server.cli import main
from server.schemas import ChatRequest
from tests.steering.chat_server import ChatServer, Json, serving

QUESTION = [[{"role": "user", "content": "What is 2 + 3?"}]]
FUNCTION = {
    "name": "water.level",
    "description": "The level of a lock.",
    "parameters": {
        "type": "dict",
        "properties": {
            "lock": {"type": "string"},
            "metres": {"type": "float", "default": 1.5},
            "marks": {"type": "tuple", "items": {"type": "dict", "properties": {"at": {"type": "any"}}}},
        },
        "required": ["lock"],
    },
}
TRUTHS = [
    [{"water.level": {"lock": ['Upper "A"', "A"], "metres": ["", 2.5], "marks": [[{"at": [-1]}]]}}],
    [{"water.level": {"lock": ["it's; {low}"]}}, {"water.level": {"lock": ["é\n"], "metres": [""]}}],
    [{"water.level": {"class": [True]}}],
]


def _cases(folder: Path) -> Path:
    (folder / "possible_answer").mkdir()
    ids = [f"mine_{number}" for number in range(3)]
    entries = [{"id": one, "question": QUESTION, "function": [FUNCTION]} for one in ids]
    truths = [{"id": one, "ground_truth": truth} for one, truth in zip(ids, TRUTHS, strict=True)]
    several = {"id": "t", "question": QUESTION * 2, "function": [FUNCTION]}
    for name, lines in (("mine", entries), ("irrelevance", entries), ("turns", [several])):
        (folder / f"BFCL_v4_{name}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "BFCL_v4_format_sensitivity.json").write_text("{\n}")
    (folder / "possible_answer" / "BFCL_v4_mine.json").write_text("".join(json.dumps(one) + "\n" for one in truths))
    return folder


def test_cases_come_back_in_every_format_that_can_say_them(tmp_path: Path) -> None:
    found = dict(read_cases(_cases(tmp_path)))
    assert set(found) == {"mine", "irrelevance"}
    assert found["mine"][0].calls == [
        ("water_level", {"lock": 'Upper "A"', "metres": 2.5, "marks": [{"at": -1}]}),
    ]
    assert found["mine"][1].calls == [("water_level", {"lock": "it's; {low}"}), ("water_level", {"lock": "é\n"})]
    rows = {row.name: (row.value, row.ratio_to) for row in round_trips("mine", found["mine"])}
    assert rows["mine, hermes"] == rows["mine, llama3_json"] == (3, "3 expressible")
    assert rows["mine, pythonic"] == (2, "2 expressible")


@pytest.mark.parametrize("form", FORMATS)
def test_a_changed_call_is_seen(form: str) -> None:
    text = written(form, [("level", {"lock": "A"})])
    assert text is not None
    assert reread(form, text) == [("level", {"lock": "A"})]
    assert reread(form, text.replace("A", "B")) == [("level", {"lock": "B"})]
    assert reread(form, "no call") == []


def test_functions_become_tools_that_the_server_takes() -> None:
    tool = tool_of(FUNCTION)
    assert tool["function"]["name"] == "water_level"
    properties = tool["function"]["parameters"]["properties"]
    assert properties["metres"] == {"type": "number"}
    assert properties["marks"]["items"]["properties"] == {"at": {}}
    ChatRequest.model_validate({"model": "m", "messages": QUESTION[0], "tools": [tool]})


class _Calling(ChatServer):
    """Calls for the first question of each mode, answers the second, refuses the third."""

    def completion(self, body: Json) -> Json:
        call = {"id": "1", "type": "function", "function": {"name": "water_level", "arguments": "{}"}}
        asked = sum(one["tool_gate"] == body["tool_gate"] for one in self.requests)
        message = {"role": "assistant", "content": "5"} | ({"tool_calls": [call]} if asked == 1 else {})
        decision = "suppress" if body["tool_gate"]["mode"] == "observe" else "allow"
        return {"choices": [{"message": message}], "gateway": {"tool_gate": {"decision": decision}}}


def test_irrelevant_questions_are_asked_with_the_gate_off_and_observing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = _Calling()
    chat.fail = lambda index, body: (400, "too long") if index % 3 == 0 else None
    out = tmp_path / "rows.json"
    with serving(chat):
        given = ["--bfcl", str(_cases(tmp_path)), "--url", f"{chat.url}/v1", "--model", "m", "--json", str(out)]
        assert main(["bench", "parsers", *given]) == 0
    rows = {row["name"]: (row["value"], row["ratio"], row["ratio_to"]) for row in json.loads(out.read_text())["rows"]}
    assert rows["irrelevance, off: with a call"] == (1, 0.5, "2 answers")
    assert rows["irrelevance: would be withheld"] == (2, 1.0, "2 answers")
    assert "mine, hermes" in capsys.readouterr().out


def test_a_folder_without_cases_is_named(tmp_path: Path) -> None:
    with pytest.raises(CasesError, match="bfcl_eval/data"):
        dict(read_cases(tmp_path))
    (tmp_path / "BFCL_v4_mine.json").write_text("{")
    with pytest.raises(CasesError, match="BFCL_v4_mine"):
        dict(read_cases(tmp_path))


@pytest.mark.slow
def test_a_server_that_does_not_start_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as chat:
        url = f"{chat.url}/v1"
    assert main(["bench", "parsers", "--bfcl", str(_cases(tmp_path)), "--url", url, "--wait", "1"]) == 1
    said = capsys.readouterr().err
    assert said.count("waiting for the server to start, 1 s left") == 1
    assert f"was answered: the server has not started within 1 s: {url}" in said
