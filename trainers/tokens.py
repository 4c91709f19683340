"""Rows to token ids, as the server renders chats: the chat template, or the tool template where tools are in play."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainers.errors import DataError
from trainers.rows import Row

IGNORED = -100  # the label that carries no loss


@dataclass(frozen=True)
class TokenRow:
    """A chat as token ids; labels are -100 on all that the assistant does not say."""

    input_ids: list[int]
    labels: list[int]


def tokenize_row(tokenizer: Any, row: Row, max_length: int, tool_template: str = "") -> TokenRow:
    """Every assistant turn after the prompt that the server would make of all before it, each with its end token.

    Raises DataError when the row does not fit `max_length`: a cut answer would teach to stop anywhere.
    """
    chat = row.chat
    turns = [(chat[:place], _said(tokenizer, row, place, tool_template)) for place in _assistant_turns(chat)]
    ids: list[int] = []
    labels: list[int] = []
    for before, said in [*turns, (chat, row.completion)]:
        prompt = chat_ids(tokenizer, before, row.tools, tool_template)
        if prompt[: len(ids)] != ids:
            raise DataError(f"{row.prompt!r}: the chat template renders an assistant's turn otherwise than it was said")
        answer: list[int] = [*tokenizer(said, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        labels += [IGNORED] * (len(prompt) - len(ids)) + answer
        ids = prompt + answer
    if len(ids) > max_length:
        raise DataError(f"{row.prompt!r} and its answer have {len(ids)} tokens; train.max_length is {max_length}")
    return TokenRow(ids, labels)


def prompt_ids(tokenizer: Any, row: Row, tool_template: str = "") -> list[int]:
    """Ids of a row up to where its answer starts."""
    return chat_ids(tokenizer, row.chat, row.tools, tool_template)


def chat_ids(
    tokenizer: Any, chat: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], tool_template: str
) -> list[int]:
    """Ids of a chat up to where the assistant's answer starts."""
    text = _rendered(tokenizer, chat, tools, tool_template, answering=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _rendered(
    tokenizer: Any,
    chat: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    tool_template: str,
    answering: bool,
) -> str:
    kind: dict[str, Any] = {}
    if tools or any(message.get("tool_calls") or message["role"] == "tool" for message in chat):
        if not tool_template:
            raise DataError("rows with tools need data.tool_template")
        kind = {"tools": list(tools) or None, "chat_template": tool_template}
    messages = [_plain(message) for message in chat]
    text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=answering, tokenize=False, **kind)
    return text


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates know it: text for content, objects for arguments."""
    found = {**message, "content": message.get("content") or ""}
    if message.get("tool_calls"):
        found["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    return found


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {**call, "function": {**function, "arguments": parsed}}


def _assistant_turns(chat: Sequence[Mapping[str, Any]]) -> list[int]:
    return [place for place, message in enumerate(chat) if message["role"] == "assistant"]


def _said(tokenizer: Any, row: Row, place: int, tool_template: str) -> str:
    """What the assistant said in the turn at `place`, without the end token."""
    chat = row.chat
    before = _rendered(tokenizer, chat[:place], row.tools, tool_template, answering=True)
    after = _rendered(tokenizer, chat[: place + 1], row.tools, tool_template, answering=False)
    end: str = tokenizer.eos_token
    if not after.startswith(before) or end not in after[len(before) :]:
        raise DataError(f"{row.prompt!r}: the chat template does not end an assistant's turn with {end!r}")
    return after[len(before) :].rsplit(end, 1)[0]
