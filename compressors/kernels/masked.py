"""Packs a SparseFactor for the GPU kernels: a bit for each position and the values of the set bits, in one buffer on the device.

There is one form for all columns, because one kernel reads all of them: 1 + 8d bits a position at density d for int8 values.

Legend: m out features, n in features, r rank. A matrix has outputs (rows) and inputs (positions): V^T is [r, n], U is [m, r].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressors.execution import SparseFactor
from compressors.kernels.forms import BF16, FP32, INT8, positions_and_values, without_empty_columns

# Of a row of the table that a kernel reads: where a piece belongs, how it is scaled, and addresses.
FIELDS = 16
(
    OUT_OFFSET,
    OUT_FEATURES,
    RANK,  # 0: the piece is one matrix [m, n]
    H_OFFSET,  # where its V^T x lies among those of its slot
    KIND,
    ROLE,
    SCALE,
    U_MASKS,
    U_STARTS,
    U_VALUES,
    V_MASKS,
    V_STARTS,
    V_VALUES,
) = range(13)
ON_RANK, ON_INPUT, ON_OUTPUT = range(3)  # what the scale counts along: roles
_ALIGN = 16
_MAX_SPLITS, _SPLIT_STEP = 8, 64

Triples = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]  # output, input, value


def split_inputs(inputs: int) -> tuple[int, int]:
    """Into how many parts a few rows' product with V^T is cut along its inputs, and their width: by the matrix alone."""
    steps = -(-inputs // _SPLIT_STEP)
    width = -(-steps // _MAX_SPLITS) * _SPLIT_STEP
    return -(-inputs // width), width


@dataclass(frozen=True)
class Piece:
    """A delta on one part of a linear: U and V, or one matrix (`rank` 0), with a scale along one axis and a weight for all."""

    out_features: int
    out_offset: int
    rank: int
    kind: int
    role: int
    buffer: torch.Tensor  # u8
    at: tuple[int, ...]  # bytes from its start: the fields from SCALE on
    weight: float = 1.0
    shared: bool = False  # the buffer belongs to another delta

    def fields(self, h_offset: int) -> list[int]:
        """The piece's row of the table."""
        address = self.buffer.data_ptr()
        row = [self.out_offset, self.out_features, self.rank, h_offset, self.kind, self.role]
        row += [address + at for at in self.at]
        return row + [0] * (FIELDS - len(row))


def pack_piece(factor: SparseFactor, device: torch.device) -> Piece | None:
    """The form of a factor that the GPU kernels read. None for a factor that adds nothing."""
    factor = without_empty_columns(factor)
    if not factor.rank:
        return None
    v, u = _entries(factor.v_start, factor.v_entries), _entries(factor.u_start, factor.u_entries)
    single = _single(factor, v, u)
    if single is not None:
        role, scale, matrix = single
        rank, kind = 0, _kind(factor.packed, matrix[2])
        arrays = [scale, *_masked(matrix, (factor.out_features, factor.in_features), (1, factor.in_features), kind)]
    else:
        rank, role, kind = factor.rank, ON_RANK, _kind(factor.packed, v[2], u[2])
        columns, rows, values = u
        arrays = [factor.coef, *_masked((rows, columns, values), (factor.out_features, rank), (1, rank), kind)]
        arrays += _masked(v, (rank, factor.in_features), split_inputs(factor.in_features), kind)
    at, buffer = _joined(arrays)
    on_device = torch.from_numpy(buffer).to(device)
    return Piece(factor.out_features, factor.out_offset, rank, kind, role, on_device, at)


def _entries(start: npt.NDArray[np.int64], entries: npt.NDArray[Any]) -> Triples:
    rows, values = positions_and_values(entries)
    return np.repeat(np.arange(len(start) - 1), np.diff(start)), rows, values


def _single(factor: SparseFactor, v: Triples, u: Triples) -> tuple[int, npt.NDArray[np.float32], Triples] | None:
    """Role, scale and entries of the delta itself, where V only picks inputs (DARE, raw) or U only outputs (signs); else None."""
    if _picks(v):
        scale = np.zeros(factor.in_features, dtype=np.float32)
        scale[v[1]] = factor.coef
        return ON_INPUT, scale, (u[1], v[1][u[0]], u[2])
    if _picks(u):
        scale = np.zeros(factor.out_features, dtype=np.float32)
        scale[u[1]] = factor.coef
        return ON_OUTPUT, scale, (u[1][v[0]], v[1], v[2])
    return None


def _picks(side: Triples) -> bool:
    """Whether every column has one entry, a 1 in a row of its own."""
    columns, rows, values = side
    return bool(
        len(rows) == columns[-1] + 1
        and (columns == np.arange(len(rows))).all()
        and (values == 1).all()
        and (np.diff(rows) > 0).all()
    )


def _kind(packed: bool, *values: npt.NDArray[np.float32]) -> int:
    if all(((one == np.rint(one)) & (one >= -128) & (one <= 127)).all() for one in values):
        return INT8
    return BF16 if packed else FP32


def _masked(
    entries: Triples, shape: tuple[int, int], splits: tuple[int, int], kind: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Bits u8 [outputs, inputs / 8], where the values of each part of each output start i32 [outputs, parts], and the values."""
    (output, position, value), (outputs, inputs), (parts, width) = entries, shape, splits
    order = np.argsort(output * inputs + position)
    output, position, value = output[order], position[order], value[order]
    bits = np.zeros((outputs, -(-inputs // 8) * 8), dtype=np.uint8)
    bits[output, position] = 1
    counts = np.bincount(output * parts + position // width, minlength=outputs * parts)
    starts = (np.cumsum(counts) - counts).astype(np.int32)
    return np.packbits(bits, axis=1, bitorder="little"), starts, _narrowed(value, kind)


def _narrowed(values: npt.NDArray[np.float32], kind: int) -> npt.NDArray[Any]:
    if kind == INT8:
        return values.astype(np.int8)
    if kind == BF16:
        return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
    return values


def _joined(arrays: Sequence[npt.NDArray[Any]]) -> tuple[tuple[int, ...], npt.NDArray[np.uint8]]:
    """Where each array starts in one buffer, and the buffer."""
    sizes = [-(-array.nbytes // _ALIGN) * _ALIGN for array in arrays]
    ends = np.cumsum(sizes)
    buffer = np.zeros(int(ends[-1]), dtype=np.uint8)
    at = tuple(int(end) - size for end, size in zip(ends, sizes, strict=True))
    for start, array in zip(at, arrays, strict=True):
        buffer[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return at, buffer
