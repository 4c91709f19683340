"""Integers of 2 to 8 bits, packed without gaps. No torch.

Value i of a run has the bits [i * width, (i + 1) * width) of the run, least significant bit first, in two's complement. The
bits behind the last value are zero, so that the same values always give the same bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from compressors.errors import ArtifactError

WIDTHS = (2, 3, 4, 8)


def largest(width: int) -> int:
    """The largest value; codes are symmetric, so -largest is the smallest that is written."""
    return int((1 << (width - 1)) - 1)


def packed_size(count: int, width: int) -> int:
    """Bytes of `count` values."""
    return (count * width + 7) // 8


def pack(values: npt.NDArray[np.int8], width: int) -> npt.NDArray[np.uint8]:
    """Values [n] in [-2^(width-1), 2^(width-1)) -> bytes [ceil(n * width / 8)]."""
    if width == 8:
        return np.ascontiguousarray(values).view(np.uint8)
    bits = np.unpackbits(values.view(np.uint8)[:, None], axis=1, count=width, bitorder="little")
    return np.packbits(bits.reshape(-1), bitorder="little")


def unpack(packed: npt.NDArray[np.uint8], count: int, width: int) -> npt.NDArray[np.int8]:
    """Bytes -> values [count]. Raises ArtifactError for another number of bytes or a bit behind the last value."""
    if len(packed) != packed_size(count, width):
        raise ArtifactError(f"{count} values of {width} bits need {packed_size(count, width)} bytes, not {len(packed)}")
    if width == 8:
        return packed.view(np.int8)
    if width == 4:  # the common one, without the detour over single bits
        return _nibbles(packed, count)
    bits = np.unpackbits(packed, bitorder="little")
    if bits[count * width :].any():
        raise ArtifactError("the padding behind the last packed value is not zero")
    codes = np.packbits(bits[: count * width].reshape(count, width), axis=1, bitorder="little")[:, 0]
    shift = 8 - width
    return (codes << np.uint8(shift)).view(np.int8) >> np.int8(shift)


def _nibbles(packed: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.int8]:
    if count % 2 and packed[-1] >> 4:
        raise ArtifactError("the padding behind the last packed value is not zero")
    pairs = np.empty((len(packed), 2), dtype=np.uint8)
    pairs[:, 0], pairs[:, 1] = packed << 4, packed & 0xF0
    return (pairs.reshape(-1)[:count].view(np.int8)) >> np.int8(4)
