"""The text that a compression is calibrated and judged on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from compressors.errors import CheckpointError


@dataclass(frozen=True)
class Calibration:
    """A text file, or chats as .jsonl, and how many sequences of how many tokens are taken from its start.

    A row of .jsonl is {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}; chats are rendered by the
    model's own template. What a fine-tune was made for says more about it than any other text.
    """

    text: Path
    sequences: int = 32
    length: int = 256

    def tokens(self, model: Path) -> torch.Tensor:
        """Token ids [sequences, length] under the tokenizer of a model folder. Raises CheckpointError for too short a text."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        wanted, found = self.sequences * self.length, []
        for text in self._texts(tokenizer):
            found += tokenizer(text)["input_ids"]
            if len(found) >= wanted:
                break
        count = min(self.sequences, len(found) // self.length)
        if not count:
            raise CheckpointError(
                f"{self.text} has {len(found)} tokens; a calibration needs one sequence of {self.length} at least"
            )
        return torch.tensor(found[: count * self.length]).view(count, self.length)

    def _texts(self, tokenizer: Any) -> list[str]:
        try:
            content = self.text.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.text} is no UTF-8 text") from None
        if self.text.suffix != ".jsonl":
            return [content]
        lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
        return [self._row(number, line, tokenizer) for number, line in lines]

    def _row(self, number: int, line: str, tokenizer: Any) -> str:
        place = f"{self.text}, line {number}"
        try:
            row = json.loads(line)
            if "text" in row:
                return str(row["text"])
            chat = row.get("messages") or [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise CheckpointError(
                f"{place}: expected an object with text, messages, or prompt and completion"
            ) from None
        try:
            return str(tokenizer.apply_chat_template(chat, tokenize=False))
        except (TemplateError, ValueError, TypeError) as error:
            raise CheckpointError(f"{place}: the model's chat template refuses it: {error}") from None
