"""Compression, counted three honest ways; dense means 2 bytes a value."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compressors.artifact import Artifact
from compressors.layout import is_projection

_VALUES = ("u_vals", "v_vals", "a", "b", "delta")


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


def recount(artifact: Artifact) -> Tally:
    """The tally of a delta file, from its records and arrays alone."""
    tally = Tally()
    for name, record in artifact.records.items():
        count = math.prod(record.shape)
        tally.dense_bytes += 0 if record.tied_to else 2 * count
        if not ("#" in name or is_projection(name, len(record.shape))):
            continue
        tally.projection_values += count
        for key in record.sha256:
            array = artifact.array(f"{name}::{key}")
            tally.projection_bytes += array.nbytes
            tally.kept_values += array.size if key in _VALUES else 0
    return tally
