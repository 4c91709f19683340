"""How many bytes a delta takes in execution form, told from the file's header and its counts, before anything is decoded.

What is told is never less than what a kernel then holds: the C++ kernel chooses a form for each column, so for it an upper bound,
about twice what int8 values take. The pool counts the true size as soon as a delta has been loaded once. No torch.

Legend: m out features, n in features, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from compressors.artifact import Artifact, Record
from compressors.errors import ArtifactError
from compressors.execution import outside_projections
from compressors.layout import HEAD, input_table

# What the kernels hold: entries column after column, torch's fp32 CSR, or bitmasks and values on a GPU.
Form = Literal["sparse", "csr", "masked"]

_FACTOR_STRUCT_BYTES = 112  # of a factor in the C++ kernel's table
_COLUMN_BYTES = 20  # of a column of one side: where it lies, and its index up to a multiple of 4
_SIDE_BYTES = 68  # what a vector load may read behind a side's last value and index
_PAD = 16  # values that a whole column is filled up to
# Bytes of an entry at most, by the width of its value: a column is stored whole from a density of .4 on at the lowest, and with
# 2 bytes of index an entry below.
_ENTRY_BYTES = {1: 3, 2: 5, 4: 10}
_STARTS_BYTES = 32  # of a column of V on a GPU: where the values of its parts start, 8 at most
_ALIGNED_BYTES = 7 * 16  # its seven arrays are filled up


@dataclass(frozen=True)
class Extent:
    """Size of one weight's factors: how many entries U and V have together, and the bytes of a value (1, 2 or 4).

    `alone`: one of the two is the identity, so that the C++ kernel holds the other one only, row after row of the weight.
    """

    out_features: int
    in_features: int
    rank: int
    entries: int
    width: int
    alone: bool = False

    def nbytes(self, form: Form) -> int:
        """Bytes in memory: exact for torch's CSR, at most for the others."""
        if form == "csr":  # value fp32 and index i32 an entry, and the row pointers of V^T [r, n] and U [m, r]
            return 8 * self.entries + 4 * (self.rank + self.out_features + 2)
        narrow = max(self.out_features, self.in_features) <= 1 << 16
        width = self.width if narrow else 4  # wider positions do not fit beside a value, which is then fp32
        if form == "masked":
            return self._masked(width)
        columns = self.out_features if self.alone else 2 * self.rank
        sides = 2 * _SIDE_BYTES + columns * (_COLUMN_BYTES + _PAD * width)
        entry = _ENTRY_BYTES[width] + (0 if narrow else 2)
        return _FACTOR_STRUCT_BYTES + 4 * max(self.rank, self.in_features) + sides + entry * self.entries

    def _masked(self, width: int) -> int:
        out, size = self.out_features, self.in_features
        values = width * self.entries + _ALIGNED_BYTES
        if self.alone:
            return values + out * (-(-size // 8) + 4) + 4 * max(out, size)
        u, v = out * (-(-self.rank // 8) + 4), self.rank * (-(-size // 8) + _STARTS_BYTES)
        return values + u + v + 4 * self.rank


def execution_nbytes(path: Path, form: Form = "sparse") -> int:
    """Bytes of a delta file in execution form. Raises ArtifactError (FormatVersionError), OSError. Blocking."""
    with Artifact.open(path) as artifact:
        tied = None if HEAD in artifact.records else input_table(artifact.records)
        nbytes = 0
        for name, record in artifact.records.items():
            if record.kind == "zero":
                continue
            if outside_projections(record):  # a head that repeats the input table has a view of it, counted again
                nbytes += _outside(artifact, name) * (2 if name == tied else 1)
            else:
                nbytes += extent(artifact, name, record).nbytes(form)
    return nbytes


def extent(artifact: Artifact, name: str, record: Record) -> Extent:
    """Raises ArtifactError for a kind without factors or without its arrays."""
    if len(record.shape) != 2:
        raise ArtifactError(f"{name} has shape {list(record.shape)}; a projection has two dimensions")
    rows, columns = record.shape
    if record.kind == "impart":
        kept = [artifact.array(f"{name}::keep_{label}") for label in "uv"]
        width = max(_width(artifact, name, f"{label}_vals", record) for label in "uv")
        return Extent(rows, columns, len(kept[0]), sum(int(keep.sum(dtype=np.int64)) for keep in kept), width)
    if record.kind == "lowrank":
        rank = artifact.array(f"{name}::a").shape[0]
        width = max(_width(artifact, name, label, record) for label in "ab")
        return Extent(rows, columns, rank, rank * (rows + columns), width)
    if record.kind == "sparse":  # entries of the delta itself; V is the identity
        count = int(artifact.array(f"{name}::count")[0])
        return Extent(rows, columns, columns, count + columns, _width(artifact, name, "vals", record), True)
    if record.kind == "signs":
        one = len(artifact.array(f"{name}::scale")) == 1  # else the identity is U, and has a column a row
        return Extent(rows, columns, columns if one else rows, rows * columns + (columns if one else rows), 1, True)
    if record.kind == "raw":
        return Extent(rows, columns, columns, (rows + 1) * columns, _width(artifact, name, "delta", record), True)
    raise ArtifactError(f"{name} is stored as {record.kind!r}, which has no factors")


def _width(artifact: Artifact, name: str, label: str, record: Record) -> int:
    """Bytes of a value in the C++ kernel: int8 stays as it is, and what is packed is widened to it; fp16 becomes fp32."""
    slot = artifact.slots.get(f"{name}::{label}")
    if record.bits or (slot is not None and slot.dtype == "I8"):
        return 1
    return 2 if slot is not None and slot.dtype == "BF16" else 4


def _outside(artifact: Artifact, name: str) -> int:
    """A vector as fp32, or the changed rows of a table: an i64 index, values (bf16 becomes fp32), and a scale for int8."""
    record = artifact.records[name]
    if record.kind == "raw":
        return 4 * record.shape[0]
    values = artifact.array(f"{name}::row_delta")
    widened = 2 if artifact.slots[f"{name}::row_delta"].dtype == "BF16" else 1
    scale = 4 * len(values) if f"{name}::row_scale" in artifact.slots else 0
    return 8 * len(values) + widened * values.nbytes + scale
