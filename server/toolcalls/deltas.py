"""What a parser says about a text, and the shape that all parsers have."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Call:
    """One call. `arguments` is JSON; `source` is the text that it was read from, all of its marks included."""

    name: str
    arguments: str
    source: str = ""


@dataclass(frozen=True)
class MoreArguments:
    """The next piece of the last call's arguments."""

    text: str


Delta = Content | Reasoning | Call | MoreArguments


class Parser(Protocol):
    """Reads one text in pieces of any size. How a text is cut changes no call, and no letter of the content.

    `malformed` is set when something that looks like a call is none and went out as content.
    """

    malformed: bool

    def feed(self, text: str) -> list[Delta]: ...

    def finish(self) -> list[Delta]:
        """The text has ended; what was held back is decided now."""
        ...


# All that reading JSON or Python that a model wrote can raise. Depth is limited by the interpreter's stack.
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, SyntaxError, RecursionError, MemoryError)


def attempt(read: Callable[[str], list[Call]], text: str) -> list[Call] | None:
    """The calls of a text; None where it holds none, or where reading fails in whatever way."""
    try:
        return read(text) or None
    except _UNREADABLE:
        return None


def to_call(found: Any, keys: Iterable[str], source: str) -> Call:
    """`found` is decoded JSON; its arguments stand under the first of `keys` that it has. Raises as `attempt` expects."""
    if not isinstance(found, Mapping) or not isinstance(found["name"], str):
        raise TypeError("not a call")
    given = [key for key in keys if key in found]
    return Call(found["name"], json.dumps(found[given[0]], ensure_ascii=False), source)


def content(text: str) -> list[Delta]:
    return [Content(text)] if text else []


def partial_tag(text: str, tags: Iterable[str]) -> int:
    """Length of the longest end of `text` that could still become one of the tags."""
    longest = 0
    for tag in tags:
        for size in range(min(len(tag) - 1, len(text)), longest, -1):
            if text.endswith(tag[:size]):
                longest = size
                break
    return longest
