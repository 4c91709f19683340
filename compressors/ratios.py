"""Compression, counted three honest ways; dense means 2 bytes a value."""

from __future__ import annotations

from dataclasses import dataclass

from compressors.artifact import Artifact, Record

PROJECTION_KINDS = ("impart", "lowrank")


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
    """The tally of a delta file, from its arrays alone."""
    tally = Tally()
    for name, record in artifact.records.items():
        count = 1
        for extent in record.shape:
            count *= extent
        tally.dense_bytes += 0 if record.tied_to else 2 * count
        if not is_projection(name, record):
            continue
        tally.projection_values += count
        for key, slot in artifact.slots.items():
            if key.startswith(f"{name}::"):
                tally.projection_bytes += slot.end - slot.start
                if key.rpartition("::")[2] in ("u_vals", "v_vals", "a", "b", "delta"):
                    tally.kept_values += artifact.array(key).size
    return tally


def is_projection(name: str, record: Record) -> bool:
    """Whether a record is a projection's: stored as factors, or a matrix that is no vocabulary table."""
    from compressors.layout import is_embedding

    return record.kind in PROJECTION_KINDS or (len(record.shape) == 2 and not is_embedding(name.partition("#")[0]))
