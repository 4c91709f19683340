"""The delta product on GPUs, host side: the op `deltaworks::add_slots`, its launches, and the kernel that loads deltas for it.

Grids depend on shapes alone, so that a CUDA graph that recorded them replays with other deltas and other rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from triton import knobs

from compressors.execution import SparseFactor
from compressors.kernels.forms import KINDS
from compressors.kernels.masked import Piece, pack_piece, split_inputs
from compressors.kernels.slots import FEW_ROWS, MANY_ROWS, SlotGroups, SlotRows, SlotTable, num_many
from compressors.kernels.triton_kernels import expand, shrink

FEW_BLOCKS = {"BLOCK_T": FEW_ROWS, "BLOCK_O": 16, "BLOCK_P": 64, "num_warps": 4}
MANY_BLOCKS = {"BLOCK_T": MANY_ROWS, "BLOCK_O": 64, "BLOCK_P": 64, "num_warps": 8}
_RANK_PROGRAMS = 32  # side by side along the ranks of a tile; each takes every 32nd block
_TILES_AT_ONCE = 32  # of many rows: bounds the memory of V^T x


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid and arguments: what a CUDA graph records, and `run` replays."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def run(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.constants)


def launches(
    y: torch.Tensor,
    x: torch.Tensor,
    fields: torch.Tensor,
    weights: torch.Tensor,
    counts: torch.Tensor,
    rows: torch.Tensor,
    few: torch.Tensor,
    many: torch.Tensor,
    max_rank: int,
) -> list[Launch]:
    """What adds the deltas of a step; which deltas and which rows is read from the buffers when it runs."""
    num_rows, inputs = x.shape
    num_parts, part_width = split_inputs(inputs)
    table = (fields, weights, counts, rows)
    few = few[: min(len(few), num_rows)]
    found = _pair(y, x, table, few, max_rank, (num_parts, part_width), FEW_BLOCKS, False)
    num_tiles, fast = num_many(num_rows, len(few)), x.dtype is torch.bfloat16
    for start in range(0, num_tiles, _TILES_AT_ONCE):
        tiles = many[start : min(start + _TILES_AT_ONCE, num_tiles)]
        found += _pair(y, x, table, tiles, max_rank, (1, inputs), MANY_BLOCKS, fast)
    return found


def _pair(
    y: torch.Tensor,
    x: torch.Tensor,
    table: tuple[torch.Tensor, ...],
    tiles: torch.Tensor,
    max_rank: int,
    parts: tuple[int, int],
    blocks: dict[str, int],
    fast: bool,
) -> list[Launch]:
    num_parts, part_width = parts
    h_rows = len(tiles) * blocks["BLOCK_T"]
    h = torch.empty(num_parts * h_rows, max(1, max_rank), dtype=torch.float32, device=x.device)
    constants = {"PIECES": table[0].shape[1], "FAST": fast, "INTERPRETED": bool(knobs.runtime.interpret), **blocks}
    stored = split_inputs(x.shape[1])[0]  # parts that V's starts know; many rows read the first of them
    block = blocks["BLOCK_O"]
    programs = min(_RANK_PROGRAMS, max(1, -(-max_rank // block)))
    shrinking = (x, x.stride(0), h, h_rows, h.shape[1], x.shape[1], part_width, stored, *table, tiles)
    expanding = (y, y.stride(0), x, x.stride(0), h, h_rows, h.shape[1], x.shape[1], num_parts, *table, tiles)
    return [
        Launch(shrink, (len(tiles), num_parts, programs), shrinking, constants | {"PROGRAMS": programs}),
        Launch(expand, (len(tiles), -(-y.shape[1] // block)), expanding, constants),
    ]


def add_slots(
    y: torch.Tensor,
    x: torch.Tensor,
    fields: torch.Tensor,
    weights: torch.Tensor,
    counts: torch.Tensor,
    rows: torch.Tensor,
    few: torch.Tensor,
    many: torch.Tensor,
    max_rank: int,
) -> None:
    """The op: y [T, m] += the deltas of x [T, n], in place."""
    if not len(x):
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    for launch in launches(y, x, fields, weights, counts, rows, few, many, max_rank):
        launch.run()


@functools.cache
def define_op() -> torch.library.Library:
    """Define `deltaworks::add_slots`, with a fake implementation for tracing: once, because an op belongs to the process."""
    # torch leaves its library untyped.
    library = torch.library.Library("deltaworks", "FRAGMENT")  # type: ignore[no-untyped-call]
    table = "Tensor fields, Tensor weights, Tensor counts, Tensor rows, Tensor few, Tensor many, int max_rank"
    library.define(f"add_slots(Tensor(a!) y, Tensor x, {table}) -> ()")  # type: ignore[no-untyped-call]
    library.impl("add_slots", add_slots, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake("deltaworks::add_slots", lambda *args: None, lib=library)
    return library


class TritonSlots:
    """Adds deltas with the Triton kernels: one op per linear for all deltas of the step and all parts of a fused linear."""

    name = "triton-slots"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        define_op()

    def prepare(self, factors: Sequence[SparseFactor]) -> tuple[Piece, ...]:
        """Execution form of all parts of one linear."""
        found = (pack_piece(factor, self.device) for factor in factors)
        return tuple(piece for piece in found if piece is not None)

    def scaled(self, prepared: tuple[Piece, ...], weight: float) -> tuple[Piece, ...]:
        """The same delta times `weight`; all but the weight is shared."""
        return tuple(replace(piece, weight=piece.weight * weight, shared=True) for piece in prepared)

    def nbytes(self, prepared: tuple[Piece, ...]) -> int:
        """Bytes on the device that `prepared` holds for itself."""
        return sum(piece.buffer.nbytes for piece in prepared if not piece.shared)

    def describe(self, prepared: Iterable[tuple[Piece, ...]]) -> str:
        """The forms that a delta was put into: for the log, once at load."""
        pieces = [piece for one in prepared for piece in one]
        kinds = ", ".join(f"{sum(piece.kind == kind for piece in pieces)} {name}" for kind, name in enumerate(KINDS))
        return f"bitmasks; {kinds} tensors ({sum(not piece.rank for piece in pieces)} as one matrix)"

    def group(self, parts: Sequence[tuple[tuple[Piece, ...], npt.NDArray[np.int64]]]) -> SlotGroups | None:
        """What `apply` needs for the deltas of one step on one linear, in buffers of its own: (prepared, rows [t]) per delta."""
        if not any(prepared for prepared, _ in parts):
            return None
        rank = max(sum(piece.rank for piece in prepared) for prepared, _ in parts)
        table = SlotTable(len(parts), max(len(prepared) for prepared, _ in parts), rank, self.device)
        step = SlotRows(sum(len(rows) for _, rows in parts), len(parts), self.device)
        for slot, (prepared, _) in enumerate(parts):
            table.write(slot, prepared)
        step.begin([(slot, rows) for slot, (_, rows) in enumerate(parts)])
        return SlotGroups(table, step, [prepared for prepared, _ in parts])

    def apply(self, y: torch.Tensor, x: torch.Tensor, groups: SlotGroups) -> None:
        """y [T, m] += the deltas of x [T, n] for the rows of the step, in place; sums are fp32."""
        table, step = groups.table, groups.rows
        torch.ops.deltaworks.add_slots(
            y, x, table.fields, table.weights, table.counts, step.rows, step.few, step.many, table.max_rank
        )
