"""A tokenizer whose tokens are bytes."""

from collections.abc import Sequence
from typing import Any

from server.core import Message, Tool


class ByteTokenizer:
    vocab_size = 256

    def __init__(self, chat_template: str = "{{ messages }}") -> None:
        self.chat_template = chat_template

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        return [chr(token) for token in ids]

    def facts(self) -> dict[str, Any]:
        return {"tokenizer_class": "ByteTokenizer", "eos_token": "\x00"}

    def apply_chat_template(self, messages: Sequence[Message]) -> str:
        return "".join(f"{message.role[0]}:{message.content}\n" for message in messages)

    @property
    def own_tool_template(self) -> str:
        return self.chat_template

    def apply_tool_template(self, template: str, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        """A line of what is shown, then the chat."""
        shown = "".join(f"{tool.name};" for tool in tools)
        called = "".join(f"{call.name}={call.arguments};" for message in messages for call in message.calls)
        return f"{shown}|{called}|{self.apply_chat_template(messages)}"
