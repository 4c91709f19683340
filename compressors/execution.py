"""Stored form -> execution form: what a kernel reads to add one delta to the output of one linear.

Legend: m out features, n in features, r rank, k column. A factor is V [n, r] and U [m, r], both kept column after column as
(row, value) entries; the delta of the linear is sum_k coef[k] * U[:, k] V[:, k]^T. Under tensor parallelism a worker holds the
rows of U or of V that belong to its shard, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compressors.artifact import Artifact, Record
from compressors.factors import Columns, MaskSource, decoded, read_factors
from compressors.masks import column_keys, factor_rows

WIDE_ENTRY = np.dtype([("value", np.float32), ("row", np.uint32)])


@dataclass(frozen=True)
class Shard:
    """The part of a weight [out, in] that a worker holds, as half-open ranges, and where its output starts in a fused linear."""

    out_range: tuple[int, int]
    in_range: tuple[int, int]
    out_offset: int = 0


@dataclass(frozen=True)
class SparseFactor:
    """Execution form of one weight's delta on one shard. Entries are u32 words (bf16 value high, row low) or WIDE_ENTRY pairs."""

    out_features: int
    in_features: int
    out_offset: int
    coef: npt.NDArray[np.float32]  # [r]
    v_start: npt.NDArray[np.int64]  # [r + 1]
    u_start: npt.NDArray[np.int64]  # [r + 1]
    v_entries: npt.NDArray[Any]
    u_entries: npt.NDArray[Any]

    @property
    def rank(self) -> int:
        return len(self.coef)

    @property
    def packed(self) -> bool:
        return self.v_entries.dtype == np.uint32

    @property
    def nbytes(self) -> int:
        """Bytes resident in memory."""
        arrays = (self.coef, self.v_start, self.u_start, self.v_entries, self.u_entries)
        return sum(array.nbytes for array in arrays)


def sparse_factor(artifact: Artifact, name: str, shard: Shard, masks: MaskSource = factor_rows) -> SparseFactor:
    """Execution form of the record `name` of an artifact. Raises ArtifactError for a kind without factors."""
    factors = read_factors(artifact, name, masks)
    u, v = factors.u.within(*shard.out_range), factors.v.within(*shard.in_range)
    rows = max(shard.out_range[1] - shard.out_range[0], shard.in_range[1] - shard.in_range[0])
    encode = _packed if u.bf16_exact and v.bf16_exact and rows <= 1 << 16 else _wide
    return SparseFactor(
        out_features=shard.out_range[1] - shard.out_range[0],
        in_features=shard.in_range[1] - shard.in_range[0],
        out_offset=shard.out_offset,
        coef=np.array(factors.coef, dtype=np.float32),  # a copy: a view would hold the whole file in memory
        v_start=v.start,
        u_start=u.start,
        v_entries=encode(v),
        u_entries=encode(u),
    )


def outside_projections(record: Record) -> bool:
    """Whether a record changes the model outside its linear projections: a vocabulary table, a norm or a bias."""
    return record.kind == "rows" or (record.kind == "raw" and len(record.shape) == 1)


def changed_rows(
    artifact: Artifact, name: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[np.float32] | None]:
    """A "rows" record in memory of its own: index int64 [t], values [t, width] (int8, fp16 or fp32), and for int8 a scale [t]."""
    index = artifact.array(f"{name}::row_idx").astype(np.int64)
    values = artifact.array(f"{name}::row_delta")
    if f"{name}::row_scale" in artifact.slots:
        return index, values.copy(), artifact.array(f"{name}::row_scale").copy()
    return (
        index,
        decoded(values, artifact.slots[f"{name}::row_delta"].dtype)[0] if values.dtype == np.uint16 else values.copy(),
        None,
    )


def raw_delta(artifact: Artifact, name: str) -> npt.NDArray[np.float32]:
    """A "raw" record as fp32, in its own shape and memory."""
    key = f"{name}::delta"
    return decoded(artifact.array(key), artifact.slots[key].dtype)[0].copy()


def _packed(columns: Columns) -> npt.NDArray[np.uint32]:
    values = np.ascontiguousarray(columns.values)
    return values.view(np.uint32) | columns.rows.astype(np.uint32)


def _wide(columns: Columns) -> npt.NDArray[np.void]:
    entries = np.empty(len(columns.rows), dtype=WIDE_ENTRY)
    entries["value"], entries["row"] = columns.values, columns.rows
    return entries


def native_masks(
    kept_rows: Callable[[npt.NDArray[np.uint64], npt.NDArray[np.int32], int], npt.NDArray[np.int32]],
) -> MaskSource:
    """A MaskSource over the C++ kernel's `kept_rows`: the same rows as numpy's, several times faster."""

    def masks(seed: int, side: int, num_rows: int, keep: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        return kept_rows(column_keys(seed, side, len(keep)), keep, num_rows)

    return masks
