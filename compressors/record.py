"""One parameter's change before it is written."""

from __future__ import annotations

from dataclasses import dataclass, field

from compressors.artifact import Array, Kind, Mask
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
