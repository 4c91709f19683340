"""One parameter's change before it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from compressors.artifact import DTYPE_NAMES, Array, Kind, Mask, Record, Slot
from compressors.values import Bits


@dataclass(frozen=True)
class Encoded:
    """A record of a delta file and its arrays. bf16 arrays are uint16 bit patterns."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    arrays: dict[str, Array] = field(default_factory=dict)
    rank: int = 0
    tied_to: str | None = None
    mask: Mask | None = None
    bits: Bits = ()

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


class Unwritten:
    """Records that no file holds yet, readable as those of one (`compressors.artifact.Source`).

    `seed`: of their masks; `mask`: the code of those that are written out.
    """

    def __init__(self, seed: int, *encoded: Encoded, mask: Mask | None = None) -> None:
        self.seed = seed
        self.mask: str = mask or "seeded"
        self.records = {one.name: as_record(one, {}) for one in encoded}
        self._arrays = {f"{one.name}::{key}": array for one in encoded for key, array in one.arrays.items()}
        self.slots = {
            key: Slot(DTYPE_NAMES[array.dtype], array.shape, 0, array.nbytes) for key, array in self._arrays.items()
        }

    def array(self, key: str) -> Array:
        return self._arrays[key]


def as_record(encoded: Encoded, digests: Mapping[str, str]) -> Record:
    """What the manifest says of it; `digests`: SHA-256 of its arrays."""
    return Record(
        kind=encoded.kind,
        shape=encoded.shape,
        rank=encoded.rank,
        tied_to=encoded.tied_to,
        mask=encoded.mask,
        bits=encoded.bits,
        sha256=dict(digests),
    )
