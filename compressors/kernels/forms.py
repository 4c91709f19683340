"""Packs a SparseFactor into the form that the C++ kernel reads (see factors.h): a form for each column, one kind of values.

Legend: m out features, n in features, r rank. A side is V [n, r] or U [m, r] as columns of entries.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compressors.execution import WIDE_ENTRY, SparseFactor

DENSE, MASK, INDEX16, INDEX32 = range(4)
INT8, BF16, FP32 = range(3)
KINDS = ("int8", "bf16", "fp32")
VALUE_TYPES = (np.dtype(np.int8), np.dtype(np.uint16), np.dtype(np.float32))
PAD = 16  # factors.h
PAST = 64  # bytes that a vector load may read past the last value

COLUMN = np.dtype([("values_at", np.uint32), ("index_at", np.uint32), ("count", np.int32), ("form", np.int32)])


@dataclass(frozen=True)
class Side:
    """One side in the kernel's form."""

    columns: npt.NDArray[np.void]  # COLUMN [r]
    values: npt.NDArray[Any]
    index: npt.NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        return self.columns.nbytes + self.values.nbytes + self.index.nbytes


@dataclass(frozen=True)
class PackedFactor:
    """A factor in the kernel's form. `identity_u`: U is the identity, r == m, and coef [n] scales x."""

    out_features: int
    in_features: int
    out_offset: int
    kind: int
    coef: npt.NDArray[np.float32]
    v: Side
    u: Side | None

    @property
    def identity_u(self) -> bool:
        return self.u is None

    @property
    def sides(self) -> tuple[Side, ...]:
        return (self.v,) if self.u is None else (self.v, self.u)

    @property
    def rank(self) -> int:
        return len(self.v.columns)

    @property
    def entries(self) -> int:
        """Values, a dense column's zeros included."""
        return sum(int(side.columns["count"].sum(dtype=np.int64)) for side in self.sides)

    @property
    def density(self) -> float:
        """Share of the positions of both sides that hold a value."""
        positions = self.rank * (self.in_features + (0 if self.u is None else self.out_features))
        return self.entries / max(1, positions)

    @property
    def nbytes(self) -> int:
        return self.coef.nbytes + sum(side.nbytes for side in self.sides)


def pack_factor(library: ctypes.CDLL, factor: SparseFactor, dense_from: float, mask_from: float) -> PackedFactor | None:
    """The kernel's form of a factor; a column is dense or masked from these densities on. None for a factor that adds nothing."""
    factor = without_empty_columns(factor)
    if not factor.rank:
        return None
    by_row = _by_output_row(factor)
    kind = _kind(library, factor)
    if kind == FP32:
        mask_from = dense_from  # a level expands int8 and bf16 well; fp32 is rare

    def side(entries: npt.NDArray[Any], start: npt.NDArray[np.int64], rows: int) -> Side:
        return _side(library, entries, start, rows, kind, dense_from, mask_from)

    if by_row is not None:
        coef, start, entries = by_row
        v, u = side(entries, start, factor.in_features), None
    else:
        coef = factor.coef
        v = side(factor.v_entries, factor.v_start, factor.in_features)
        u = side(factor.u_entries, factor.u_start, factor.out_features)
    return PackedFactor(factor.out_features, factor.in_features, factor.out_offset, kind, coef, v, u)


def _side(
    library: ctypes.CDLL,
    entries: npt.NDArray[Any],
    start: npt.NDArray[np.int64],
    rows: int,
    kind: int,
    dense_from: float,
    mask_from: float,
) -> Side:
    entries, start = np.ascontiguousarray(entries), np.ascontiguousarray(start, dtype=np.int64)
    count = np.diff(start)
    narrow = rows <= 1 << 16
    sparse = INDEX16 if narrow else INDEX32
    form = np.where(count >= dense_from * rows, DENSE, np.where(count >= mask_from * rows, MASK, sparse))
    wide = -(-rows // PAD) * PAD
    num_values = np.where(form == DENSE, wide, count)
    num_bytes = np.where(form == DENSE, 0, np.where(form == MASK, wide // 8, count * (2 if narrow else 4)))
    values_at = np.concatenate([[0], np.cumsum(num_values)])
    index_at = np.concatenate([[0], np.cumsum(-(-num_bytes // 4) * 4)])  # u32 indices stay aligned
    columns = np.empty(len(count), dtype=COLUMN)
    columns["values_at"], columns["index_at"] = values_at[:-1], index_at[:-1]
    columns["count"], columns["form"] = np.where(form == DENSE, rows, count), form
    dtype = VALUE_TYPES[kind]
    values = np.zeros(int(values_at[-1]) + PAST // dtype.itemsize, dtype=dtype)
    index = np.zeros(int(index_at[-1]) + 4, dtype=np.uint8)
    library.dw_pack(
        entries.ctypes.data,
        int(entries.dtype == np.uint32),
        start.ctypes.data,
        len(count),
        kind,
        columns.ctypes.data,
        values.ctypes.data,
        index.ctypes.data,
    )
    return Side(columns, values, index)


def _kind(library: ctypes.CDLL, factor: SparseFactor) -> int:
    both = (factor.v_entries, factor.u_entries)
    if all(library.dw_all_int8(side.ctypes.data, int(factor.packed), len(side)) for side in both):
        return INT8
    return BF16 if factor.packed else FP32


def without_empty_columns(factor: SparseFactor) -> SparseFactor:
    """A column that is empty on one side adds nothing; shards of a tensor have many of them."""
    u_count, v_count = np.diff(factor.u_start), np.diff(factor.v_start)
    used = (u_count > 0) & (v_count > 0)
    if used.all():
        return factor
    return SparseFactor(
        factor.out_features,
        factor.in_features,
        factor.out_offset,
        np.ascontiguousarray(factor.coef[used]),
        np.concatenate([[0], np.cumsum(v_count[used])]),
        np.concatenate([[0], np.cumsum(u_count[used])]),
        factor.v_entries[np.repeat(used, v_count)],
        factor.u_entries[np.repeat(used, u_count)],
    )


def _by_output_row(
    factor: SparseFactor,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[Any]] | None:
    """When V only picks inputs: coef [n] of x, and the entries of U output row after output row, as a V; else None.

    So a delta that is stored entry by entry (DARE, signs, raw) is one product, and gathers where it would scatter.
    """
    v_rows, v_values = positions_and_values(factor.v_entries)
    if len(v_rows) != factor.rank or (v_values != 1).any() or (np.diff(v_rows) <= 0).any():
        return None
    coef = np.zeros(factor.in_features, dtype=np.float32)
    coef[v_rows] = factor.coef
    rows, values = positions_and_values(factor.u_entries)
    order = np.argsort(rows.astype(np.uint16) if factor.packed else rows, kind="stable")
    inputs = np.repeat(v_rows, np.diff(factor.u_start))[order]
    start = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=factor.out_features))])
    if factor.packed:
        return coef, start, values[order].view(np.uint32) | inputs.astype(np.uint32)
    entries = np.empty(len(inputs), dtype=WIDE_ENTRY)
    entries["value"], entries["row"] = values[order], inputs
    return coef, start, entries


def positions_and_values(entries: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Entries of a SparseFactor as positions and fp32 values."""
    if entries.dtype == np.uint32:
        return (entries & np.uint32(0xFFFF)).astype(np.int64), (entries & np.uint32(0xFFFF0000)).view(np.float32)
    return entries["row"].astype(np.int64), np.ascontiguousarray(entries["value"])
