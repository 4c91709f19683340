"""Compression, counted three honest ways; dense means 2 bytes a value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from compressors.artifact import Array, Artifact
from compressors.layout import is_projection


@dataclass
class Tally:
    """Counts over one delta."""

    projection_values: int = 0  # of the dense projections
    kept_values: int = 0  # surviving values of their factors: what the paper counts
    projection_bytes: int = 0  # everything stored for them, coefficients and counts too
    dense_bytes: int = 0  # of the whole fine-tune, a tied table once

    @property
    def values_ratio(self) -> float | None:
        return round(self.projection_values / self.kept_values, 2) if self.kept_values else None

    @property
    def bytes_ratio(self) -> float | None:
        return round(2 * self.projection_values / self.projection_bytes, 2) if self.projection_bytes else None

    def add(self, name: str, shape: tuple[int, ...], tied: bool, arrays: Mapping[str, Array]) -> None:
        """Count one record and the arrays that are stored for it."""
        count = math.prod(shape)
        self.dense_bytes += 0 if tied else 2 * count
        if "#" in name or is_projection(name, len(shape)):
            self.projection_values += count
            self.projection_bytes += sum(array.nbytes for array in arrays.values())
            self.kept_values += kept_values(arrays, count)


def kept_values(arrays: Mapping[str, Array], count: int) -> int:
    """Surviving values of one projection with `count` entries; a sign is one, whatever its width."""
    if "signs" in arrays:
        return count
    counts = [arrays[key].sum(dtype=np.int64) for key in ("keep_u", "keep_v", "count") if key in arrays]
    return int(sum(counts)) or sum(arrays[key].size for key in ("a", "b", "delta") if key in arrays)


def recount(artifact: Artifact) -> Tally:
    """The tally of a delta file, from its records and arrays alone."""
    tally = Tally()
    for name, record in artifact.records.items():
        arrays = {key: artifact.array(f"{name}::{key}") for key in record.sha256}
        tally.add(name, record.shape, record.tied_to is not None, arrays)
    return tally
