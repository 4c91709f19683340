"""`deltaworks bench parsers`: the cases of the Berkeley Function-Calling Leaderboard, as its package `bfcl-eval` ships them.

Its accepted answers are written down in the format of each parser, read again piece by piece, and compared: a parser that
loses or changes a call shows here. With a server's address, the questions that no tool fits, and those that one does, are
asked with the tools shown: the share that is answered with a call, with the tool gate off and observing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import keyword
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from server.bench.report import BenchError, Measurement, reported
from server.toolcalls import PARSERS, fold
from server.toolcalls.deltas import Delta
from steering.errors import EndpointError
from steering.gate.endpoint import Endpoint, pointed

Json = dict[str, Any]
Calls = list[tuple[str, Json]]
FORMATS = ("hermes", "llama3_json", "pythonic")
_PIECE = 7  # characters
_NO_CASES = "format_sensitivity"  # a list of other files' cases
# Types of Python, Java and JavaScript by JSON schema's word for them
_WORDS = {"object": ("dict", "hashmap"), "array": ("tuple", "arraylist"), "string": ("char",), "integer": ("long",)}
_TYPES = {word: kind for kind, words in (_WORDS | {"number": ("float", "double")}).items() for word in words}
_ANY = ("any", "")


class CasesError(BenchError):
    """The folder holds no cases that can be read; the message names the file."""


@dataclass(frozen=True)
class Case:
    """`calls` is one accepted answer; empty where the cases of a category have none."""

    id: str
    messages: tuple[Json, ...]
    functions: tuple[Json, ...]
    calls: Calls


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write JSON where asked."""
    return reported(args.json, lambda: _measured(args))


def _measured(args: argparse.Namespace) -> list[Measurement]:
    categories = dict(read_cases(args.bfcl, args.limit))
    answered = {name: cases for name, cases in categories.items() if any(case.calls for case in cases)}
    rows = [row for name, cases in answered.items() for row in round_trips(name, cases)]
    if args.url:
        rest = {name: cases for name, cases in categories.items() if name.endswith("relevance")}
        rows += asyncio.run(asked(args.url, args.model, rest, args.wait))
    return rows


def read_cases(folder: Path, limit: int | None = None) -> Iterator[tuple[str, list[Case]]]:
    """Categories of one turn and their cases. Raises CasesError."""
    files = [path for path in sorted(folder.glob("BFCL_v*_*.json")) if _NO_CASES not in path.name]
    if not files:
        raise CasesError(f"{folder} has no BFCL_v*_*.json; give the folder bfcl_eval/data of the unpacked package")
    for path in files:
        try:
            entries = _lines(path)[:limit]
            if not all("function" in entry and len(entry["question"]) == 1 for entry in entries):
                continue  # several turns, or tools of its own: not a case of one text
            answers = folder / "possible_answer" / path.name
            truths = {entry["id"]: entry["ground_truth"] for entry in _lines(answers)} if answers.exists() else {}
            yield (
                path.stem.split("_", 2)[2],
                [
                    Case(
                        one["id"], tuple(one["question"][0]), tuple(one["function"]), _calls(truths.get(one["id"], ()))
                    )
                    for one in entries
                ],
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CasesError(f"cannot read the cases {path}: {error!r}") from error


def round_trips(category: str, cases: Sequence[Case]) -> list[Measurement]:
    """For each format: cases whose calls come back as they were, of those that it can express at all."""
    rows = []
    for form in FORMATS:
        texts = [(case, written(form, case.calls)) for case in cases if case.calls]
        told = [(case, text) for case, text in texts if text is not None]
        lost = [case.id for case, text in told if reread(form, text) != case.calls]
        if lost:
            print(f"{form} does not give back {' '.join(lost)}")
        kept = len(told) - len(lost)
        ratio = kept / len(told) if told else None
        rows.append(Measurement(f"{category}, {form}", kept, "cases", ratio, f"{len(told)} expressible"))
    return rows


def written(form: str, calls: Calls) -> str | None:
    """The calls as a model writes them; None where the format has no words for them."""
    if form == "hermes":
        blocks = [json.dumps({"name": name, "arguments": given}, ensure_ascii=False) for name, given in calls]
        return "\n".join(f"<tool_call>\n{block}\n</tool_call>" for block in blocks)
    if form == "llama3_json":
        return "; ".join(json.dumps({"name": name, "parameters": given}, ensure_ascii=False) for name, given in calls)
    if any(not word.isidentifier() or keyword.iskeyword(word) for name, given in calls for word in (name, *given)):
        return None
    texts = [f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})" for name, given in calls]
    return f"[{', '.join(texts)}]"


def reread(form: str, text: str) -> Calls:
    """What the parser makes of the text as a stream brings it."""
    parser = PARSERS[form]()
    deltas: list[Delta] = []
    for start in range(0, len(text), _PIECE):
        deltas += parser.feed(text[start : start + _PIECE])
    found = fold([*deltas, *parser.finish()])
    return [(call.name, json.loads(call.arguments)) for call in found.calls]


async def asked(url: str, model: str, categories: Mapping[str, Sequence[Case]], start_s: float) -> list[Measurement]:
    """Share of questions answered with a call, by category and mode; what the server refuses is left out.

    Raises EndpointError where it answers nothing of a category.
    """
    rows = []
    async with Endpoint(url, concurrency=4, start_s=start_s, tell=partial(print, file=sys.stderr)) as endpoint:
        for category, cases in categories.items():
            for mode in ("off", "observe"):
                told = await asyncio.gather(*(_ask(endpoint, model, case, mode) for case in cases))
                answers = [one for one in told if not isinstance(one, EndpointError)]
                if not answers:
                    raise EndpointError(f"no question of {category} was answered: {told[0] if told else 'it has none'}")
                called, withheld = (sum(one[place] for one in answers) for place in (0, 1))
                of = f"{len(answers)} answers"
                rows.append(Measurement(f"{category}, {mode}: with a call", called, "", called / len(answers), of))
            rows.append(Measurement(f"{category}: would be withheld", withheld, "", withheld / len(answers), of))
    return rows


async def _ask(endpoint: Endpoint, model: str, case: Case, mode: str) -> tuple[bool, bool] | EndpointError:
    """Whether there is a call, and whether the gate would have withheld tools; the error where the request is refused."""
    tools = [tool_of(function) for function in case.functions]
    body = {"model": model, "messages": list(case.messages), "tools": tools, "tool_gate": {"mode": mode}}
    try:
        answer = await endpoint.chat({**body, "temperature": 0, "max_tokens": 64})
    except EndpointError as error:
        return error
    _, decision = pointed(answer.body, "/gateway/tool_gate/decision")
    return bool(answer.tool_calls), decision in ("suppress", "narrow")


def tool_of(function: Json) -> Json:
    """A function of the cases as OpenAI has it: names without dots, types of JSON schema."""
    described = {"name": _name(function["name"]), "description": function.get("description", "")}
    return {"type": "function", "function": {**described, "parameters": _schema(function["parameters"])}}


def _schema(schema: Json) -> Json:
    found = {key: value for key, value in schema.items() if key in ("description", "enum", "required")}
    told = str(schema.get("type", "any")).lower()
    if told not in _ANY:
        found["type"] = _TYPES.get(told, told)
    if "properties" in schema:
        found["properties"] = {key: _schema(value) for key, value in schema["properties"].items()}
    return found | ({"items": _schema(schema["items"])} if isinstance(schema.get("items"), dict) else {})


def _calls(truth: Sequence[Json]) -> Calls:
    return [(_name(name), _first(given)) for call in truth for name, given in call.items()]


def _first(given: Mapping[str, Sequence[Any]]) -> Json:
    """The first accepted value of each argument; "" there means that it may be left out."""
    chosen = {key: next((value for value in values if value != ""), None) for key, values in given.items()}
    return {key: _inner(value) for key, value in chosen.items() if value is not None}


def _inner(value: Any) -> Any:
    """Objects inside of values list what is accepted once more."""
    if isinstance(value, list):
        return [_inner(one) for one in value]
    return _first(value) if isinstance(value, dict) and all(isinstance(one, list) for one in value.values()) else value


def _name(name: str) -> str:
    return name.replace(".", "_")


def _lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
