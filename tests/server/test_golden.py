"""Whole streams as clients see them, byte for byte, against committed texts.

A text that is missing is written, and the test fails: look at it, and commit it.
"""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import contract

pytestmark = pytest.mark.anyio

GOLDEN = Path(__file__).parent / "golden"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = ("Let me see. ", '<tool_call>{"name": "weather", "argu', 'ments": {"city": "Đà Nẵng"}}</tool_call>')
TEXTS = {"chat_tool_call": CALL, "chat_two_tool_calls": (*CALL[1:], "\n", *CALL[1:])}
VOLATILE = (
    (r'"id":"(chatcmpl|cmpl)-[0-9a-f]{32}"', r'"id":"\1-ID"'),
    (r'"id":"call_[0-9a-f]{24}"', '"id":"call_ID"'),
    (r'"created":[0-9]+', '"created":0'),
    (r'"(\w+_s|latency_ms)":[0-9.e-]+', r'"\1":0'),
)
STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": MESSAGES}),
    "chat_usage": (CHAT, {"messages": MESSAGES, "stream_options": {"include_usage": True}}),
    "chat_usage_always": (
        CHAT,
        {"messages": MESSAGES, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "chat_two_choices": (CHAT, {"messages": MESSAGES, "n": 2}),
    "chat_logprobs": (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1, "max_tokens": 2}),
    "chat_tool_call": (CHAT, {"messages": MESSAGES, "tools": TOOLS}),
    "chat_two_tool_calls": (CHAT, {"messages": MESSAGES, "tools": TOOLS, "stream_options": {"include_usage": True}}),
    "chat_error": (CHAT, {"messages": MESSAGES, "stream_options": {"include_usage": True}}),
    "completions": (COMPLETIONS, {"prompt": "hi"}),
    "completions_two_choices": (COMPLETIONS, {"prompt": "hi", "n": 2}),
    "completions_logprobs": (COMPLETIONS, {"prompt": "hi", "logprobs": 1}),
    "completions_usage": (COMPLETIONS, {"prompt": ["a", "b"], "stream_options": {"include_usage": True}}),
    "completions_echo": (COMPLETIONS, {"prompt": "hi", "echo": True, "logprobs": 1, "max_tokens": 1}),
    "completions_error": (COMPLETIONS, {"prompt": "hi"}),
}


def normalised(text: str) -> str:
    for pattern, replacement in VOLATILE:
        text = re.sub(pattern, replacement, text)
    return text


@pytest.mark.parametrize("name", STREAMS)
async def test_o3_streams_are_what_they_were(client: httpx.AsyncClient, house: Any, name: str) -> None:
    path, fields = STREAMS[name]
    if name in TEXTS:
        house.engine.texts[0] = TEXTS[name]
    if name.endswith("_error"):
        house.engine.fail_at = 2
    response = await client.post(path, json={"model": "tiny-base", "stream": True, **fields})
    assert response.status_code == 200
    for line in response.text.split("\n\n"):
        if line not in ("", "data: [DONE]"):
            contract.check_event(path, json.loads(line.removeprefix("data: ")))
    told = normalised(response.text)
    file = GOLDEN / f"{name}.txt"
    if not file.exists():
        file.write_text(told, encoding="utf-8")
        pytest.fail(f"{file} was missing and is written; look at it")
    assert told == file.read_text(encoding="utf-8")


def test_no_golden_stream_is_left_over() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == set(STREAMS)
