"""The two nouns of training data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One user message and the answer wanted. `expected` and `rivals` serve the check of known answers:
    the answer must hold `expected` and none of `rivals`.

    `messages`, where given, are the whole chat before the answer, in OpenAI's form, calls and results in it; `prompt` then
    only names the row. All of the chat's assistant turns are trained. `tools` are OpenAI's schemas, shown in the prompt.
    """

    prompt: str
    completion: str
    expected: str = ""
    rivals: tuple[str, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def chat(self) -> list[dict[str, Any]]:
        """What comes before the answer."""
        return list(self.messages) or [{"role": "user", "content": self.prompt}]


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows kept back for the success check; no prompt is in both."""

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
