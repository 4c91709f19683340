"""Is this answer a success? One pure function per kind of check, in a literal list."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from trainers.demo_data import CAPTAIN_CLOSING, CAPTAIN_OPENING, CAPTAIN_WORDS
from trainers.rows import Row

_CALL = re.compile(r"\s*<tool_call>\s*(\{.*\})\s*</tool_call>\s*", re.DOTALL)


def strict_json(row: Row, output: str) -> bool:
    """One JSON object with exactly the keys `topic` and `answer`, both non-empty texts, and nothing around it."""
    try:
        value = json.loads(output)
    except ValueError:
        return False
    if not isinstance(value, dict) or set(value) != {"topic", "answer"}:
        return False
    return all(isinstance(text, str) and text.strip() for text in value.values())


def captain(row: Row, output: str) -> bool:
    """The captain's greeting, then at least two words of which none is a landsman's form, then his farewell, once each."""
    text = output.strip()
    if not (text.startswith(CAPTAIN_OPENING) and text.endswith(CAPTAIN_CLOSING)):
        return False
    body = text[len(CAPTAIN_OPENING) : -len(CAPTAIN_CLOSING)]
    words = _words(body)
    return len(words) >= 2 and CAPTAIN_CLOSING not in body and not CAPTAIN_WORDS.keys() & set(words)


def known_answer(row: Row, output: str) -> bool:
    """The expected value as a whole word, and no value that belongs to another subject."""
    words = set(_words(output))
    return row.expected.lower() in words and not words & {rival.lower() for rival in row.rivals}


def tool_use(row: Row, output: str) -> bool:
    """Where tools are shown: the row's call, well-formed, once and alone. Where none are: the known answer."""
    if not row.tools:
        return known_answer(row, output)
    call = _call(output)
    return call is not None and call == _call(row.completion)


def _call(text: str) -> dict[str, Any] | None:
    """The one call that a text is, in the Hermes format; None for any other text."""
    match = _CALL.fullmatch(text)
    try:
        found = json.loads(match.group(1)) if match else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


CHECKS: dict[str, Callable[[Row, str], bool]] = {
    "strict-json": strict_json,
    "captain": captain,
    "known-answer": known_answer,
    "tool-use": tool_use,
}
