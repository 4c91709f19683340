"""One batch as one sequence whose rows share their common beginning.

Every row of a chat fine-tune starts with the same system prompt, which for short rows is most of the tokens. Here the
common prefix stands once, the rows' remainders follow it, and a mask lets each remainder see the prefix and itself only.
Positions restart after the prefix in every row. Losses and gradients are those of the rows trained side by side, without
padding.

Shape suffixes: T = prefix + the sum of the remainders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from trainers.data import IGNORED


class SharedPrefixCollator:
    """Rows of `input_ids` and `labels` to one batch: `input_ids`, `position_ids` and `labels` [1, T], boolean
    `attention_mask` [1, 1, T, T]."""

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        prefix = _common_prefix(rows)
        ids = list(rows[0]["input_ids"][:prefix])
        labels = [IGNORED] * prefix
        positions = list(range(prefix))
        owner = [-1] * prefix
        for number, row in enumerate(rows):
            rest = row["input_ids"][prefix:]
            ids += rest
            labels += row["labels"][prefix:]
            positions += range(prefix, prefix + len(rest))
            owner += [number] * len(rest)
        owner_T = torch.tensor(owner)
        same = (owner_T[None, :] == owner_T[:, None]) | (owner_T[None, :] == -1)
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "labels": torch.tensor([labels]),
            "attention_mask": (same & torch.ones_like(same).tril())[None, None],
        }


def _common_prefix(rows: Sequence[Mapping[str, Sequence[int]]]) -> int:
    """Tokens that all rows begin with, short of the last token before any row's first label: that one predicts it."""
    first = rows[0]["input_ids"]
    limit = min(_first_label(row["labels"]) for row in rows) - 1
    for position in range(limit):
        if any(row["input_ids"][position] != first[position] for row in rows):
            return position
    return max(limit, 0)


def _first_label(labels: Sequence[int]) -> int:
    return next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
