"""Factored records of several deltas as one record that stands for their weighted sum, without loss (Task Arithmetic).

Legend: m out features, n in features, r columns of all deltas together. sum_t w_t sum_k coef_tk U_tk V_tk^T has the columns of all
deltas side by side, with w_t coef_tk as its coefficients. A seed gives the rows of column k of one delta alone, so masks are
written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compressors.artifact import Array, Artifact, Record
from compressors.factors import Columns, read_factors
from compressors.mask_codes import CODES, Code, encode_mask
from compressors.packing import pack
from compressors.record import Encoded
from compressors.values import Bits

_WHOLE_BYTE = 8
_MASKED = ("impart", "sparse")


@dataclass(frozen=True)
class Share:
    """One delta of a sum, and how often it counts."""

    artifact: Artifact
    weight: float


def join_factors(name: str, shares: Sequence[Share], code: Code | None = None) -> Encoded:
    """The record [m, n] of the weighted sum, kind "impart", its masks in `code` or, with None, in the one that takes fewer bytes.

    Every share's record has factors and is no dense matrix.

    Integers stay integers, packed as they were where all are; other values take the narrowest float that holds all of them.
    """
    factors = [read_factors(share.artifact, name) for share in shares]
    widths = [_widths(share.artifact, name, len(one.coef)) for share, one in zip(shares, factors, strict=True)]
    packed = [run for runs in widths if runs is not None for run in runs] if None not in widths else []
    if all(width == _WHOLE_BYTE for _, width in packed):
        packed = []
    coef = [share.weight * one.coef.astype(np.float64) for share, one in zip(shares, factors, strict=True)]
    arrays: dict[str, Array] = {"coef": np.concatenate(coef).astype(np.float32)}
    sides = {side: _side([getattr(one, side) for one in factors]) for side in "uv"}
    for side, (keep, _, values) in sides.items():
        arrays[f"keep_{side}"] = keep
        arrays[f"{side}_vals"] = _packed(values, keep, packed) if packed else _narrowest(values)
    record = shares[0].artifact.records[name]
    mask, written = _masks(sides, record, CODES if code is None else (code,))
    bits: Bits = tuple(packed)
    return Encoded(name, "impart", record.shape, arrays | written, len(arrays["coef"]), mask=mask, bits=bits)


def scaled(name: str, share: Share, seed: int, code: Code | None = None) -> Encoded | None:
    """The record of one delta as it is, times its weight; None where its kind, its seed or a wanted `code` does not allow that."""
    artifact, record = share.artifact, share.artifact.records[name]
    mask = _known(record.mask or artifact.manifest.mask) if record.kind in _MASKED else None
    seeded = record.kind in _MASKED and mask is None
    factor = {"impart": "coef", "sparse": "scale", "signs": "scale"}.get(record.kind)
    if (seeded and artifact.manifest.seed != seed) or (factor is None and share.weight != 1):
        return None
    if code is not None and record.kind in _MASKED and mask != code:
        return None
    arrays = {key: artifact.array(f"{name}::{key}") for key in record.sha256}
    if factor is not None:
        arrays[factor] = (arrays[factor].astype(np.float64) * share.weight).astype(np.float32)
    return Encoded(name, record.kind, record.shape, arrays, record.rank, mask=mask, bits=record.bits)


def _widths(artifact: Artifact, name: str, rank: int) -> Bits | None:
    """Runs of columns with the width of their integers; None where a factor holds floats."""
    record = artifact.records[name]
    if record.bits:
        return record.bits
    if record.kind == "signs":
        return ((rank, 2),)
    keys = {"impart": ("u_vals", "v_vals"), "sparse": ("vals",)}.get(record.kind, ())
    bytes_only = keys and all(artifact.slots[f"{name}::{key}"].dtype == "I8" for key in keys)
    return ((rank, _WHOLE_BYTE),) if bytes_only else None


def _side(parts: Sequence[Columns]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """(kept entries per column [r], their rows, their values) of one factor of all deltas."""
    keep = np.concatenate([np.diff(part.start) for part in parts]).astype(np.int32)
    rows = np.concatenate([part.rows for part in parts]).astype(np.int32)
    return keep, rows, np.concatenate([part.values for part in parts])


def _packed(values: npt.NDArray[np.float32], keep: npt.NDArray[np.int32], bits: Sequence[tuple[int, int]]) -> Array:
    codes, runs = values.astype(np.int8), []
    column = place = 0
    for columns, width in bits:
        count = int(keep[column : column + columns].sum(dtype=np.int64))
        runs.append(pack(codes[place : place + count], width))
        column, place = column + columns, place + count
    return np.concatenate(runs)


def _narrowest(values: npt.NDArray[np.float32]) -> Array:
    """int8, fp16, bf16 (as bit patterns) or fp32: the first that holds every value."""
    small = np.abs(values).max() <= 127
    if small and np.array_equal(codes := values.astype(np.int8), values):
        return codes
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if np.array_equal(half, values):
        return half
    words = values.view(np.uint32)
    return values if (words & np.uint32(0xFFFF)).any() else (words >> np.uint32(16)).astype(np.uint16)


def _masks(
    sides: dict[str, tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32]]],
    record: Record,
    codes: Sequence[Code],
) -> tuple[Code, dict[str, Array]]:
    """Both masks in that of the codes that takes fewer bytes."""
    best: tuple[Code, dict[str, Array]] | None = None
    for code in codes:
        written: dict[str, Array] = {
            f"mask_{side}": encode_mask(code, rows, keep, num_rows)
            for (side, (keep, rows, _)), num_rows in zip(sides.items(), record.shape, strict=True)
        }
        if best is None or _nbytes(written) < _nbytes(best[1]):
            best = code, written
    assert best is not None
    return best


def _nbytes(arrays: dict[str, Array]) -> int:
    return sum(array.nbytes for array in arrays.values())


def _known(mask: str) -> Code | None:
    return next((code for code in CODES if code == mask), None)
