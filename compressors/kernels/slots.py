"""What the GPU kernels read besides activations: a table of resident deltas for each linear, and the rows of the running step.

Every tensor here is written in place, at a load or before a step, and keeps its address: a CUDA graph that was captured once
reads the deltas and the rows of the step that replays it. A slot is the number by which tables know a resident delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from compressors.errors import SlotError
from compressors.kernels.masked import FIELDS, Piece

COMBINED = 4  # deltas that a combination may have
FEW_ROWS = 16  # a delta with at most so many rows in a step takes the decode kernel, in one tile
MANY_ROWS = 64  # rows of a tile of the prefill kernel


class SlotTable:
    """The deltas resident on one linear. A slot that was not written adds nothing."""

    def __init__(self, num_slots: int, num_parts: int, max_rank: int, device: torch.device) -> None:
        self.max_rank = max_rank  # of all pieces of a slot together: the width of V^T x
        pieces = num_parts * COMBINED
        self.fields = torch.zeros(num_slots, pieces, FIELDS, dtype=torch.int64, device=device)
        self.weights = torch.zeros(num_slots, pieces, dtype=torch.float32, device=device)
        self.counts = torch.zeros(num_slots, dtype=torch.int32, device=device)

    def check(self, pieces: Sequence[Piece]) -> None:
        """Raises SlotError where `write` could not take the pieces."""
        rank = sum(piece.rank for piece in pieces)
        if rank > self.max_rank:
            raise SlotError(f"its ranks on one linear sum to {rank}, over the {self.max_rank} that have room")
        if len(pieces) > self.weights.shape[1]:
            raise SlotError(
                f"it has {len(pieces)} pieces on one linear, over the {self.weights.shape[1]} that have room"
            )

    def write(self, slot: int, pieces: Sequence[Piece]) -> None:
        """Put a delta, or the parts of a combination, into a slot; the caller keeps the pieces alive. Raises SlotError."""
        self.check(pieces)
        rows, offset = [], 0
        for piece in pieces:
            rows.append(piece.fields(offset))
            offset += piece.rank
        if pieces:
            self.fields[slot, : len(pieces)] = torch.tensor(rows, dtype=torch.int64).to(self.fields.device)
            self.weights[slot, : len(pieces)] = torch.tensor([piece.weight for piece in pieces]).to(self.weights.device)
        self.counts[slot] = len(pieces)

    def clear(self, slot: int) -> None:
        self.counts[slot] = 0


class SlotRows:
    """The rows of the step by slot, shared by all linears: deltas with few rows first, then tiles of those with many.

    `few` and `many` [tiles, 3]: slot (-1: none), first of `rows`, how many.
    """

    def __init__(self, max_rows: int, max_slots: int, device: torch.device) -> None:
        """At most `max_rows` rows and `max_slots` deltas in a step."""
        self.rows = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.few = torch.full((max_slots, 3), -1, dtype=torch.int32, device=device)
        self.many = torch.full((num_many(max_rows, max_slots), 3), -1, dtype=torch.int32, device=device)

    def begin(self, groups: Sequence[tuple[int, npt.NDArray[np.int64]]]) -> None:
        """Write the coming step: (slot, rows [t]) per delta."""
        ordered = sorted(groups, key=lambda group: len(group[1]) > FEW_ROWS)
        rows: list[npt.NDArray[np.int64]] = []
        few, many, first = [], [], 0
        for slot, own in ordered:
            if len(own) <= FEW_ROWS:
                few.append((slot, first, len(own)))
            else:
                starts = range(0, len(own), MANY_ROWS)
                many += [(slot, first + start, min(MANY_ROWS, len(own) - start)) for start in starts]
            rows.append(own)
            first += len(own)
        if rows:
            self.rows[:first] = torch.from_numpy(np.concatenate(rows).astype(np.int32)).to(self.rows.device)
        _fill(self.few, few)
        _fill(self.many, many)


@dataclass(frozen=True)
class SlotGroups:
    """The deltas of one linear, the rows of a step, and the memory that the table points into where nobody else keeps it."""

    table: SlotTable
    rows: SlotRows
    owners: Sequence[tuple[Piece, ...]] = ()


def num_many(num_rows: int, max_slots: int) -> int:
    """Tiles of the prefill kernel at most: those that are full, and one that is not for each delta with that many rows."""
    return num_rows // MANY_ROWS + min(max_slots, num_rows // (FEW_ROWS + 1))


def _fill(buffer: torch.Tensor, tiles: Sequence[tuple[int, int, int]]) -> None:
    padded = [*tiles, *[(-1, 0, 0)] * (len(buffer) - len(tiles))]
    buffer.copy_(torch.tensor(padded, dtype=torch.int32).reshape(-1, 3))


class SlotNumbers:
    """Slots of resident deltas and combinations, by adapter id."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))
        self._taken: dict[int, int] = {}

    def take(self, adapter: int) -> int:
        """The slot of an adapter, a free one where it has none. Raises SlotError."""
        if adapter not in self._taken:
            if not self._free:
                raise SlotError(f"all {len(self._taken)} slots for resident deltas and combinations are taken")
            self._taken[adapter] = self._free.pop(0)
        return self._taken[adapter]

    def find(self, adapter: int) -> int | None:
        """None for an adapter that has no slot, such as vLLM's dummies."""
        return self._taken.get(adapter)

    def release(self, adapter: int) -> None:
        slot = self._taken.pop(adapter, None)
        if slot is not None:
            self._free.append(slot)
