"""Ours say of every text what vLLM's parsers say of it: the same calls to the letter, the same content."""

from typing import Any

import pytest

from server.toolcalls import parse
from tests.server.tool_texts import texts
from tests.server.vllm_parsers import NAMES, read_all, record


@pytest.fixture(scope="module")
def recorded() -> list[dict[str, Any]]:
    return record()


@pytest.mark.parametrize("parser", NAMES)
def test_as_vllm_says(recorded: list[dict[str, Any]], parser: str) -> None:
    different = []
    for answer in recorded:
        text, found = answer["text"], parse(parser, answer["text"])
        ours = {"content": found.content, "calls": [[call.name, call.arguments] for call in found.calls]}
        theirs = answer[parser] or {"content": text, "calls": []}
        if ours != theirs:
            different.append((text[:200], ours, theirs))
    assert not different


@pytest.mark.parametrize("parser", NAMES)
def test_the_texts_are_worth_it(recorded: list[dict[str, Any]], parser: str) -> None:
    """Plenty of each kind: no call, one, several, calls with text before them."""
    calls = [len(answer[parser]["calls"]) if answer[parser] else 0 for answer in recorded]
    assert len(recorded) > 500
    assert calls.count(0) > 100
    assert calls.count(1) > 30
    assert sum(count > 1 for count in calls) > 30


def test_the_texts_are_the_recorded_ones(recorded: list[dict[str, Any]]) -> None:
    """After a change of tool_texts.py: python -m tests.server.vllm_parsers."""
    assert texts() == [answer["text"] for answer in recorded]


@pytest.mark.engine
def test_the_record_is_what_vllm_says_now(recorded: list[dict[str, Any]]) -> None:
    assert read_all([answer["text"] for answer in recorded]) == recorded
