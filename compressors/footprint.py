"""How many bytes a delta takes in execution form, told from the file's header and its counts, before anything is decoded.

What is told is never less than what a kernel then holds: exact for the projections of a whole model, an upper bound for the
shards of a tensor-parallel group, each taken alone. No torch.

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

Form = Literal["sparse", "csr"]  # what the kernels hold: entries column after column, or torch's fp32 CSR

_FACTOR_STRUCT_BYTES = 64  # of a factor in the C++ kernel's table
_EXACT_IN_BF16 = ("BF16", "I8")


@dataclass(frozen=True)
class Extent:
    """Size of one weight's factors: how many entries U and V have together, and whether bf16 holds their values."""

    out_features: int
    in_features: int
    rank: int
    entries: int
    bf16_exact: bool

    def nbytes(self, form: Form) -> int:
        """Bytes in memory."""
        if form == "csr":  # value fp32 and index i32 an entry, and the row pointers of V^T [r, n] and U [m, r]
            return 8 * self.entries + 4 * (self.rank + self.out_features + 2)
        packed = self.bf16_exact and max(self.out_features, self.in_features) <= 1 << 16
        return _FACTOR_STRUCT_BYTES + 4 * self.rank + 16 * (self.rank + 1) + (4 if packed else 8) * self.entries


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
        exact = all(_exact(artifact, name, f"{label}_vals", record) for label in "uv")
        return Extent(rows, columns, len(kept[0]), sum(int(keep.sum(dtype=np.int64)) for keep in kept), exact)
    if record.kind == "lowrank":
        rank = artifact.array(f"{name}::a").shape[0]
        exact = all(_exact(artifact, name, label, record) for label in "ab")
        return Extent(rows, columns, rank, rank * (rows + columns), exact)
    if record.kind == "sparse":  # entries of the delta itself; V is the identity
        count = int(artifact.array(f"{name}::count")[0])
        return Extent(rows, columns, columns, count + columns, _exact(artifact, name, "vals", record))
    if record.kind == "signs":
        one = len(artifact.array(f"{name}::scale")) == 1  # else the identity is U, and has a column a row
        return Extent(rows, columns, columns if one else rows, rows * columns + (columns if one else rows), True)
    if record.kind == "raw":
        return Extent(rows, columns, columns, (rows + 1) * columns, _exact(artifact, name, "delta", record))
    raise ArtifactError(f"{name} is stored as {record.kind!r}, which has no factors")


def _exact(artifact: Artifact, name: str, label: str, record: Record) -> bool:
    slot = artifact.slots.get(f"{name}::{label}")
    return bool(record.bits) or (slot is not None and slot.dtype in _EXACT_IN_BF16)


def _outside(artifact: Artifact, name: str) -> int:
    """A vector as fp32, or the changed rows of a table: an i64 index, values (bf16 becomes fp32), and a scale for int8."""
    record = artifact.records[name]
    if record.kind == "raw":
        return 4 * record.shape[0]
    values = artifact.array(f"{name}::row_delta")
    widened = 2 if artifact.slots[f"{name}::row_delta"].dtype == "BF16" else 1
    scale = 4 * len(values) if f"{name}::row_scale" in artifact.slots else 0
    return 8 * len(values) + widened * values.nbytes + scale
