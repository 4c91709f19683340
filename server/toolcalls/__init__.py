"""Tool calls in the text of a model, read as it comes. README, "Tools".

`parse` reads a whole text; a stream feeds a parser of `PARSERS` itself.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from server.toolcalls.deltas import Call, Content, Delta, MoreArguments, Parser, Reasoning
from server.toolcalls.hermes import Hermes
from server.toolcalls.llama3_json import Llama3Json
from server.toolcalls.pythonic import Pythonic
from server.toolcalls.toolrl import ToolRL

PARSERS: Mapping[str, type[Parser]] = {
    "hermes": Hermes,
    "llama3_json": Llama3Json,
    "pythonic": Pythonic,
    "toolrl": ToolRL,
}


@dataclass(frozen=True)
class Parsed:
    """What a text holds. `content` is None where there is nothing but calls or reasoning."""

    content: str | None
    calls: tuple[Call, ...]
    reasoning: str | None = None
    malformed: bool = False


def parse(parser: str, text: str) -> Parsed:
    """Read a whole text with the parser of that name (a key of PARSERS). Never fails on what a model wrote."""
    reader = PARSERS[parser]()
    deltas = [*reader.feed(text), *reader.finish()]
    return fold(deltas, reader.malformed)


def fold(deltas: Iterable[Delta], malformed: bool = False) -> Parsed:
    """All that a parser said of one text, in order, as one answer."""
    content, reasoning = "", ""
    calls: list[Call] = []
    for delta in deltas:
        match delta:
            case Content(text):
                content += text
            case Reasoning(text):
                reasoning += text
            case Call():
                calls.append(delta)
            case MoreArguments(text):
                last = calls[-1]
                calls[-1] = Call(last.name, last.arguments + text, last.source)
    nothing = not content and (calls or reasoning)
    return Parsed(None if nothing else content, tuple(calls), reasoning or None, malformed)
