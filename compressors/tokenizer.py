"""A fine-tune's own tokenizer in a delta file: its files, each as the difference to the base's; and whether its tokens clash.

Only what decides how text becomes ids and back travels, and only where that differs from the base's. Files are compared and stored
in one form of their JSON (`canonical`), so that a base that another tool has saved anew is still the same. No torch: verification
rests on this module.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compressors import line_delta
from compressors.artifact import Array, Artifact, Record, TokenizerFile, TokenizerInfo
from compressors.errors import ArtifactError, BaseMismatchError, CheckpointError
from compressors.layout import vocabulary_tables

VOCABULARY = "tokenizer.json"
FILES = (VOCABULARY, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATE = "chat_template.jinja"
_LINE = 160  # characters: what is longer is broken up
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)  # of a JSON that is no tokenizer's
# Of tokenizer_config.json: paths, code, and what says nothing of the tokens. A chat template travels in the manifest.
_UNTOLD = (
    *("auto_map", "chat_template", "is_local", "local_files_only", "model_max_length", "name_or_path", "padding_side"),
    *("processor_class", "special_tokens_map_file", "tokenizer_file", "transformers_version", "truncation_side"),
)
# transformers writes this where a tokenizer has no post processor, and either class for one that is all in tokenizer.json.
_NO_POST_PROCESSOR = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


def array_key(file: str) -> str:
    """Where a delta file stores a file of the tokenizer."""
    return f"tokenizer::{file}"


@dataclass(frozen=True)
class OwnTokenizer:
    """A tokenizer as a delta file stores it: what the manifest says of each file, and its bytes; nothing where it is the base's.

    `eos_token_id`: the end token that it names.
    """

    files: Mapping[str, TokenizerFile] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)
    eos_token_id: int | None = None


def own_tokenizer(base: Path, fine_tune: Path, rows: int | None, base_rows: int | None) -> OwnTokenizer:
    """The tokenizer of the folder `fine_tune`, where that is not the base's.

    `rows` of its vocabulary tables, None where it has none. Raises CheckpointError naming the token that clashes.
    """
    if _same(base, fine_tune):  # the usual case: four seconds less than to lay both out and to load them
        return OwnTokenizer()
    ours, theirs = _texts(base), _texts(fine_tune)
    if VOCABULARY not in theirs or theirs == ours:
        return OwnTokenizer()
    if VOCABULARY not in ours:
        if rows == base_rows:
            return OwnTokenizer()
        raise CheckpointError(
            f"{base.name} has no {VOCABULARY} to compare the fine-tune's with; save it there with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    tokens = vocabulary(theirs[VOCABULARY])
    if clash := clashing(vocabulary(ours[VOCABULARY]), tokens, rows):
        raise CheckpointError(f"the tokenizer of {fine_tune.name}: {clash}")
    if _state(ours, base) == _state(theirs, base):
        return OwnTokenizer()
    encoded = {name: _encoded(text, ours.get(name)) for name, text in theirs.items()}
    return OwnTokenizer(
        {name: told for name, (told, _) in encoded.items()},
        {array_key(name): array for name, (_, array) in encoded.items()},
        tokens.ids.get(_end_token(theirs)),
    )


def load(folder: Path) -> Any:
    """transformers' tokenizer of a folder, from its files alone. Raises CheckpointError with what is wrong."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        if type(error) is Exception or isinstance(error, OSError | ValueError | KeyError | AttributeError):
            raise CheckpointError(str(error)) from error  # the tokenizers library raises bare exceptions
        raise


def with_end_token(told: int | list[int] | None, own: int | None) -> int | list[int] | None:
    """The end tokens of a config.json, and that of a tokenizer of one's own."""
    known = [told] if isinstance(told, int) else told or []
    return told if own is None or own in known else [*known, own]


def rebuilt(artifact: Artifact, base: Path) -> dict[str, str]:
    """The files of a delta's own tokenizer, by name. Raises ArtifactError, and BaseMismatchError where the base's are others."""
    return _rebuilt(artifact, _texts(base)) if artifact.manifest.tokenizer.files else {}


def check(artifact: Artifact, base: Path) -> None:
    """Whether a delta's own tokenizer can be rebuilt on this base, and fits its vocabulary. Raises as `rebuilt`."""
    if not artifact.manifest.tokenizer.files:
        return
    ours = _texts(base)
    files = _rebuilt(artifact, ours)
    if VOCABULARY not in files or VOCABULARY not in ours:
        raise ArtifactError(f"the delta's tokenizer, or its base's, has no {VOCABULARY}")
    if clash := clashing(vocabulary(ours[VOCABULARY]), vocabulary(files[VOCABULARY]), table_rows(artifact.records)):
        raise ArtifactError(f"the delta's tokenizer: {clash}")


def write(artifact: Artifact, base: Path, folder: Path) -> None:
    """The delta's tokenizer as files that transformers reads, with the chat template that it is used with. Raises as `rebuilt`."""
    _write(rebuilt(artifact, base), base, folder)
    template = artifact.manifest.tokenizer.chat_template or chat_template(base)
    if template is not None:
        (folder / TEMPLATE).write_text(template, encoding="utf-8")


def digest(told: TokenizerInfo) -> str:
    """Names the tokenizer of a delta, the same for all that have the same; "" for the base's."""
    lines = [f"{name} {told.files[name].sha256}" for name in sorted(told.files)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else ""


def chat_template(folder: Path) -> str | None:
    """Text of the one chat template of a model folder; None where it has none, or several by names."""
    file = folder / TEMPLATE
    text: Any = file.read_text(encoding="utf-8") if file.is_file() else None
    text = _object(folder / "tokenizer_config.json").get("chat_template") if text is None else text
    return text if isinstance(text, str) else None


def table_rows(records: Mapping[str, Record]) -> int | None:
    """Rows of a delta's vocabulary tables; None where it changes none."""
    tables = (records[name] for name in vocabulary_tables(records))
    return max((record.shape[0] for record in tables if record.tied_to is None), default=None)


# The form in which files are compared


def canonical(name: str, text: str) -> str:
    """A file of a tokenizer in one form, with an entry of its vocabulary a line. Raises ArtifactError."""
    try:
        return "\n".join(_layout(_values(name, text)))
    except _UNREADABLE as error:
        raise ArtifactError(f"{name} is not a tokenizer's: {error!r}") from error


def _values(name: str, text: str) -> dict[str, Any]:
    """What a file says of the tokens, in one order. Raises ArtifactError, and `_UNREADABLE` where it is no tokenizer's."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ArtifactError(f"{name} is not a JSON object")
    if name == VOCABULARY:
        return _sorted_vocabulary(value)
    if name == "tokenizer_config.json":
        return {key: value[key] for key in sorted(value) if key not in _UNTOLD}
    return value


def _sorted_vocabulary(value: dict[str, Any]) -> dict[str, Any]:
    """Tokens in the order of their ids, merges as pairs, and nothing of how a batch was padded when it was saved."""
    model = dict(value["model"])
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = dict(sorted(model["vocab"].items(), key=lambda entry: entry[1]))
    if isinstance(model.get("merges"), list):
        model["merges"] = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    added = sorted(value.get("added_tokens") or [], key=lambda token: token["id"])
    return {**value, "truncation": None, "padding": None, "added_tokens": added, "model": model}


def _layout(value: Any) -> list[str]:
    """JSON in lines: what is short stands on one."""
    short = json.dumps(value, separators=(",", ":"))
    if len(short) <= _LINE or not isinstance(value, dict | list):
        return [short]
    entries = value.items() if isinstance(value, dict) else (("", item) for item in value)
    lines = ["{" if isinstance(value, dict) else "["]
    for key, item in entries:
        below = _layout(item)
        below[0] = (f"{json.dumps(key)}:" if isinstance(value, dict) else "") + below[0]
        below[-1] += ","
        lines += below
    lines[-1] = lines[-1].removesuffix(",")
    return [*lines, "}" if isinstance(value, dict) else "]"]


# Tokens


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their ids; `special`: those that stand beside the model's own, as end tokens do."""

    ids: Mapping[str, int]
    special: frozenset[str]
    doubled: str | None  # a token that has two ids


def vocabulary(text: str) -> Vocabulary:
    """Of a canonical tokenizer.json. Raises ArtifactError."""
    try:
        value = json.loads(text)
        stored = value["model"]["vocab"]
        if isinstance(stored, list):
            stored = {entry[0]: number for number, entry in enumerate(stored)}
        ids = {str(token): int(number) for token, number in stored.items()}
        doubled = None
        for token in value["added_tokens"]:
            if ids.setdefault(str(token["content"]), int(token["id"])) != token["id"]:
                doubled = str(token["content"])
        return Vocabulary(ids, frozenset(str(token["content"]) for token in value["added_tokens"]), doubled)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ArtifactError(f"{VOCABULARY} has no vocabulary that we can read: {error!r}") from error


def clashing(base: Vocabulary, own: Vocabulary, rows: int | None) -> str | None:
    """What is wrong with a fine-tune's tokens beside the base's; None where they agree.

    A special token of the base may have got another name, if the old name is gone.
    """
    if own.doubled is not None and own.doubled != base.doubled:
        return f"the token {own.doubled!r} has two ids"
    names = {number: token for token, number in base.ids.items()}
    new: dict[int, str] = {}
    for token, number in own.ids.items():
        known = base.ids.get(token)
        if known == number:
            continue
        if known is not None:
            return f"the token {token!r} has id {number}, and {known} in the base"
        before = names.get(number)
        if before is not None and (before not in base.special or before in own.ids):
            return f"the added token {token!r} has id {number}, which is {before!r} in the base"
        if number in new:
            return f"the added tokens {new[number]!r} and {token!r} both have id {number}"
        if rows is not None and number >= rows:
            return f"the added token {token!r} has id {number}, and the vocabulary tables have {rows} rows"
        new[number] = token
    return None


# Files


def _same(base: Path, fine_tune: Path) -> bool:
    """Whether the tokenizers' files say the same at first sight: in their values, and in what saving them anew changes."""
    ours, theirs = _bytes(base), _bytes(fine_tune)
    if ours == theirs:
        return True
    try:
        return {name: _said(name, data) for name, data in ours.items()} == {
            name: _said(name, data) for name, data in theirs.items()
        }
    except (ArtifactError, *_UNREADABLE):
        return False  # what is wrong is told where they are read for good


def _said(name: str, data: bytes) -> dict[str, Any]:
    """A file's values, without what transformers writes down of a tokenizer that works as before. Raises as `_values`."""
    value = _values(name, data.decode())
    if name == VOCABULARY and value.get("post_processor") == _NO_POST_PROCESSOR:
        value["post_processor"] = None
    if name == "tokenizer_config.json":
        value.pop("backend", None)
        if value.get("tokenizer_class") in _GENERIC_CLASSES:
            value["tokenizer_class"] = None
    return value


def _bytes(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def _texts(folder: Path) -> dict[str, str]:
    """Canonical texts of the tokenizer's files in a folder. Raises CheckpointError."""
    try:
        return {
            name: canonical(name, (folder / name).read_text(encoding="utf-8"))
            for name in FILES
            if (folder / name).is_file()
        }
    except (ArtifactError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder.name}: {error}") from error


def _write(texts: Mapping[str, str], base: Path, folder: Path) -> None:
    """With the base's config.json, which says what kind of tokenizer it is where its own files do not."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    if (base / "config.json").is_file():
        shutil.copy(base / "config.json", folder)


def _end_token(texts: Mapping[str, str]) -> str:
    """The end token that the files name; "" where they name none."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = json.loads(texts.get(name, "{}")).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return ""


def _encoded(text: str, against: str | None) -> tuple[TokenizerFile, Array]:
    data = line_delta.encode(text, against or "")
    told = TokenizerFile(
        sha256=_sha256(text),
        against=None if against is None else _sha256(against),
        stored=hashlib.sha256(data).hexdigest(),
    )
    return told, np.frombuffer(data, np.uint8)


def _rebuilt(artifact: Artifact, ours: Mapping[str, str]) -> dict[str, str]:
    """`ours`: the canonical texts of the base."""
    told = artifact.manifest.tokenizer.files
    return {name: _decoded(artifact, name, told[name], ours.get(name, "")) for name in told}


def _decoded(artifact: Artifact, name: str, file: TokenizerFile, ours: str) -> str:
    if name not in FILES:
        raise ArtifactError(f"{name} is no file of a tokenizer; known are {', '.join(FILES)}")
    if file.against is not None and _sha256(ours) != file.against:
        raise BaseMismatchError(
            f"the delta's tokenizer is stored as the difference to its base's {name}, and that of this base is another: "
            "serve it with the files that the base came with"
        )
    against = "" if file.against is None else ours
    text = line_delta.decode(artifact.array(array_key(name)).tobytes(), against)
    if _sha256(text) != file.sha256:
        raise ArtifactError(f"the bytes of {array_key(name)} do not match their digest; the file is damaged")
    if canonical(name, text) != text:
        raise ArtifactError(f"{array_key(name)} is not in the form that is written")
    return text


def _state(texts: Mapping[str, str], base: Path) -> tuple[Any, ...]:
    """What decides how a tokenizer works, as it is when it is served: files of different versions may mean the same."""
    with tempfile.TemporaryDirectory() as folder:
        _write(texts, base, Path(folder))
        try:
            loaded = load(Path(folder))
            text = canonical(VOCABULARY, loaded.backend_tokenizer.to_str())
        except (CheckpointError, AttributeError) as error:
            raise CheckpointError(f"the fine-tune's tokenizer, or its base's, cannot be loaded: {error}") from error
    flags = [getattr(loaded, flag, None) for flag in ("clean_up_tokenization_spaces", "add_bos_token", "add_eos_token")]
    return text, loaded.special_tokens_map, *flags


def _object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
