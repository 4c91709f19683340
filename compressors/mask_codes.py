"""Masks written out: of merged deltas, whose kept rows no seed gives, and wherever `--mask` asks for it. No torch.

A column that keeps every row takes no bytes in either code. Of the others, column after column:

| code | bytes |
|---|---|
| bitmask | ceil(rows / 8) a column; bit j, least significant first, says whether row j is kept |
| gap8 | one a kept row: the rows skipped since the last kept one; 255 means "255 skipped, go on" |
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from compressors.errors import ArtifactError, BudgetError

Code = Literal["bitmask", "gap8"]
CODES: tuple[Code, ...] = ("bitmask", "gap8")
MASKS = ("auto", "seeded", *CODES)  # settings
_ESCAPE = 255

Rows = npt.NDArray[np.int32]


def code_of(mask: str) -> Code | None:
    """The code that a setting writes masks in; None where their seed stands for them, as with "auto": nothing is smaller.

    Raises BudgetError for an unknown setting.
    """
    if mask not in MASKS:
        raise BudgetError(f"unknown --mask {mask!r}; one of {', '.join(MASKS)}")
    return next((code for code in CODES if code == mask), None)


def mask_bytes(code: Code, keep: npt.NDArray[np.integer], num_rows: int) -> npt.NDArray[np.float64]:
    """Bytes of each column of a random mask before its rows are drawn; of gap8 the mean.

    The gap before a kept row is 255 j rows or more with a probability below (1 - 255 j / rows)^keep.
    """
    kept: npt.NDArray[np.float64] = np.asarray(keep, dtype=np.float64)
    if code == "bitmask":
        each = np.full(len(kept), float((num_rows + 7) // 8))
    else:
        free = 1 - np.arange(_ESCAPE, num_rows, _ESCAPE) / num_rows
        each = kept * (1 + sum((share**kept for share in free), start=np.zeros(len(kept))))
    return np.where(kept < num_rows, each, 0.0)


def smallest_code(rows: Rows, keep: npt.NDArray[np.integer], num_rows: int) -> Code:
    """The code that takes fewer bytes for these rows."""
    partial = keep < num_rows
    as_bits = int(partial.sum()) * ((num_rows + 7) // 8)
    return "bitmask" if as_bits <= len(_gaps(rows, keep, num_rows)) else "gap8"


def encode_mask(code: Code, rows: Rows, keep: npt.NDArray[np.integer], num_rows: int) -> npt.NDArray[np.uint8]:
    """Kept rows, column after column and ascending in each, as the bytes of a code."""
    if code == "gap8":
        return _gaps(rows, keep, num_rows)
    column = np.repeat(np.arange(len(keep)), keep)
    bits = np.zeros((len(keep), (num_rows + 7) // 8 * 8), dtype=np.uint8)
    bits[column, rows] = 1
    return np.packbits(bits[keep < num_rows], axis=1, bitorder="little").reshape(-1)


def decode_mask(code: Code, data: npt.NDArray[np.uint8], keep: npt.NDArray[np.integer], num_rows: int) -> Rows:
    """The inverse of `encode_mask`. Raises ArtifactError where the bytes do not give `keep` rows below `num_rows` a column."""
    counts: npt.NDArray[np.int64] = np.asarray(keep, dtype=np.int64)
    partial = counts < num_rows
    found = (_from_bitmask if code == "bitmask" else _from_gaps)(data, counts[partial], num_rows)
    rows = np.empty(int(counts.sum()), dtype=np.int32)
    inside = np.repeat(partial, counts)
    rows[inside] = found
    if not partial.all():  # only then has anything in the file the length of the rows
        rows[~inside] = np.tile(np.arange(num_rows, dtype=np.int32), int((~partial).sum()))
    return rows


def _from_bitmask(data: npt.NDArray[np.uint8], keep: npt.NDArray[np.int64], num_rows: int) -> Rows:
    width = (num_rows + 7) // 8
    if len(data) != len(keep) * width:
        raise ArtifactError(f"a bitmask of {len(keep)} columns needs {len(keep) * width} bytes, not {len(data)}")
    bits = np.unpackbits(data.reshape(len(keep), width), axis=1, bitorder="little")
    if bits[:, num_rows:].any():
        raise ArtifactError(f"a bitmask has a bit behind row {num_rows - 1}")
    wrong = np.flatnonzero(bits.sum(axis=1, dtype=np.int64) != keep)
    if len(wrong):
        raise ArtifactError(
            f"a bitmask column has {int(bits[wrong[0]].sum())} bits, but keeps {int(keep[wrong[0]])} rows"
        )
    rows: Rows = np.nonzero(bits)[1].astype(np.int32)
    return rows


def _gaps(rows: Rows, keep: npt.NDArray[np.integer], num_rows: int) -> npt.NDArray[np.uint8]:
    counts: npt.NDArray[np.int64] = np.asarray(keep, dtype=np.int64)
    inside = np.repeat(counts < num_rows, counts)
    kept = rows[inside].astype(np.int64)
    before = np.concatenate([[-1], kept[:-1]])
    before[_starts(counts[counts < num_rows])] = -1
    gaps = kept - before - 1
    escapes = gaps // _ESCAPE
    data = np.full(int((escapes + 1).sum()), _ESCAPE, dtype=np.uint8)
    data[np.cumsum(escapes + 1) - 1] = gaps % _ESCAPE
    return data


def _from_gaps(data: npt.NDArray[np.uint8], keep: npt.NDArray[np.int64], num_rows: int) -> Rows:
    ends = np.flatnonzero(data != _ESCAPE)
    if len(ends) != keep.sum() or (len(data) and data[-1] == _ESCAPE):
        raise ArtifactError(f"a gap8 mask gives {len(ends)} rows, but its columns keep {int(keep.sum())}")
    if not len(ends):
        return np.empty(0, dtype=np.int32)
    skipped = np.cumsum(data, dtype=np.int64)[ends]
    position = skipped + np.arange(len(ends))  # as if all columns were one
    starts = _starts(keep)
    offset = np.where(starts > 0, position[starts - 1] + 1, 0)
    rows = position - np.repeat(offset, keep)
    if rows.max() >= num_rows:
        raise ArtifactError(f"a gap8 mask reaches row {int(rows.max())} of {num_rows}")
    found: Rows = rows.astype(np.int32)
    return found


def _starts(keep: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each column begins. Every column keeps at least one row."""
    return np.concatenate([[0], np.cumsum(keep)[:-1]]).astype(np.int64) if len(keep) else np.empty(0, np.int64)
