"""One batch as one sequence whose rows share their common beginning.

Every row of a chat fine-tune starts with the same system prompt, which for short rows is most of the tokens; rows with
tools list them there. Here a common prefix stands once, the remainders of its rows follow it, and a mask lets each
remainder see its prefix and itself only; rows of another system prompt follow with theirs. Positions restart after the
prefix in every row. Losses and gradients are those of the rows trained side by side, without padding.

Shape suffixes: T = prefix + the sum of the remainders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from trainers.tokens import IGNORED

TokenIds = Mapping[str, list[int]]


class SharedPrefixCollator:
    """Rows of `input_ids` and `labels` to one batch: `input_ids`, `position_ids` and `labels` [1, T], boolean
    `attention_mask` [1, 1, T, T]. `turn_end` is the token that ends a chat's turns."""

    def __init__(self, turn_end: int | None = None) -> None:
        self._turn_end = turn_end

    def __call__(self, rows: Sequence[TokenIds]) -> dict[str, torch.Tensor]:
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        group_of: list[int] = []
        row_of: list[int] = []  # -1: of the group's prefix
        for number, group in enumerate(_grouped(rows, self._turn_end)):
            prefix = _common_prefix(group)
            parts = [(-1, 0, group[0]["input_ids"][:prefix], [IGNORED] * prefix)]
            parts += [(i, prefix, row["input_ids"][prefix:], row["labels"][prefix:]) for i, row in enumerate(group)]
            for owner, start, part, part_labels in parts:
                ids += part
                labels += part_labels
                positions += range(start, start + len(part))
                group_of += [number] * len(part)
                row_of += [owner] * len(part)
        group_T, row_T = torch.tensor(group_of), torch.tensor(row_of)
        same = (group_T[None, :] == group_T[:, None]) & ((row_T[None, :] == row_T[:, None]) | (row_T[None, :] == -1))
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "labels": torch.tensor([labels]),
            "attention_mask": (same & torch.ones_like(same).tril())[None, None],
        }


def first_turn(ids: list[int], turn_end: int | None) -> tuple[int, ...]:
    """What comes before the first end of a turn; nothing where no turn ends."""
    return tuple(ids[: ids.index(turn_end)]) if turn_end is not None and turn_end in ids else ()


def _grouped(rows: Sequence[TokenIds], turn_end: int | None) -> list[list[TokenIds]]:
    """Rows by their first turn, which is the system's and lists the tools; the rows that are alone with theirs are one group."""
    groups: dict[tuple[int, ...], list[TokenIds]] = {}
    for row in rows:
        groups.setdefault(first_turn(row["input_ids"], turn_end), []).append(row)
    alone = [row for group in groups.values() if len(group) == 1 for row in group]
    return [group for group in groups.values() if len(group) > 1] + ([alone] if alone else [])


def _common_prefix(rows: Sequence[TokenIds]) -> int:
    """Tokens that all rows begin with, short of the last token before any row's first label: that one predicts it."""
    first = rows[0]["input_ids"]
    limit = min(_first_label(row["labels"]) for row in rows) - 1
    for position in range(limit):
        if any(row["input_ids"][position] != first[position] for row in rows):
            return position
    return max(limit, 0)


def _first_label(labels: Sequence[int]) -> int:
    return next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
