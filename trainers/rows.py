"""The two nouns of training data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One user message and the answer wanted. `expected` and `rivals` serve the check of known answers:
    the answer must hold `expected` and none of `rivals`."""

    prompt: str
    completion: str
    expected: str = ""
    rivals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows kept back for the success check; no prompt is in both."""

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
