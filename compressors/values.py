"""Kept values as they are stored: 16-bit floats, or integers with a step a column.

Entries of a singular vector are close to normal, so 8 bits of the range lose nothing that shows beside the masks' noise
(notes: about 40 dB); narrower integers clip the range, where that lowers the squared error of the column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from compressors.errors import BudgetError
from compressors.packing import largest, pack, packed_size

VALUE_DTYPES = ("fp16", "bf16", "int8", "int4")
Bits = tuple[tuple[int, int], ...]  # (columns, width) in the order of the columns

_CLIPS = np.linspace(1.0, 0.3, 15)  # shares of the largest value that the largest code stands for
_WIDTHS = {"fp16": 16, "bf16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class StoredValues:
    """`array` as it is written (bf16 as uint16 bit patterns); value = stored * step[its column]; `bits` where it is packed."""

    array: npt.NDArray[np.generic]
    step: npt.NDArray[np.float64]
    bits: Bits = ()


def value_bits(value_dtype: str) -> int:
    """Bits of one stored value."""
    return _WIDTHS[value_dtype]


@dataclass(frozen=True)
class ValueForm:
    """How the kept values of one factor are stored.

    `rounded`: values [n], column after column, and the entries of each column -> what is written. `nbytes`: the bytes of that.
    `widths`: bits of a value in each of the first columns.
    """

    rounded: Callable[[npt.NDArray[np.float32], npt.NDArray[np.int32]], StoredValues]
    nbytes: Callable[[npt.NDArray[np.integer]], int]
    widths: Callable[[int], npt.NDArray[np.integer]]


def value_form(value_dtype: str) -> ValueForm:
    """All columns in one dtype. Raises BudgetError for an unknown one."""
    if value_dtype not in VALUE_DTYPES:
        raise BudgetError(f"unknown value dtype {value_dtype!r}; one of {', '.join(VALUE_DTYPES)}")

    def nbytes(keep: npt.NDArray[np.integer]) -> int:
        return packed_size(int(keep.sum(dtype=np.int64)), value_bits(value_dtype))

    widths = partial(np.full, fill_value=value_bits(value_dtype))
    return ValueForm(partial(_encode, value_dtype=value_dtype), nbytes, widths)


def _encode(values: npt.NDArray[np.float32], keep: npt.NDArray[np.int32], value_dtype: str) -> StoredValues:
    ones = np.ones(len(keep))
    if value_dtype == "fp16":
        return StoredValues(values.astype(np.float16), ones)
    if value_dtype == "bf16":
        bits = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        return StoredValues(bits, ones)
    if value_dtype == "int8":
        return StoredValues(*round_columns(values, keep, 8))
    return encode_groups(values, keep, ((len(keep), 4),))


def encode_groups(values: npt.NDArray[np.float32], keep: npt.NDArray[np.int32], bits: Bits) -> StoredValues:
    """Values of one factor rounded to the widths of its runs of columns, each run packed by itself."""
    packed, steps, column, place = [], [], 0, 0
    for columns, width in bits:
        run = keep[column : column + columns]
        count = int(run.sum(dtype=np.int64))
        codes, step = round_columns(values[place : place + count], run, width)
        packed.append(pack(codes, width))
        steps.append(step)
        column, place = column + columns, place + count
    return StoredValues(np.concatenate(packed), np.concatenate(steps), bits)


def round_columns(
    values: npt.NDArray[np.float32], keep: npt.NDArray[np.int32], width: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float64]]:
    """Symmetric rounding to nearest: codes [n] and the step of each column.

    8 bits take the whole range. Below that the range is clipped where the column's squared error falls, and the step is then
    refitted to the codes by least squares.
    """
    starts = np.concatenate([[0], np.cumsum(keep, dtype=np.int64)[:-1]])
    top = largest(width)
    whole = np.maximum.reduceat(np.abs(values), starts).astype(np.float64) / top
    whole = np.where(whole > 0, whole, 1.0)
    if width == 8:
        return _codes(values, np.repeat(whole, keep), top), whole
    step, error = whole, np.full(len(keep), np.inf)
    for clip in _CLIPS:
        tried = whole * clip
        spread = np.repeat(tried, keep)
        lost = np.add.reduceat((_codes(values, spread, top) * spread - values) ** 2, starts)
        step, error = np.where(lost < error, tried, step), np.minimum(lost, error)
    codes = _codes(values, np.repeat(step, keep), top)
    power = np.add.reduceat(codes.astype(np.float64) ** 2, starts)
    fitted = np.add.reduceat(codes * values.astype(np.float64), starts) / np.maximum(power, 1)
    return codes, np.where(fitted > 0, fitted, step)


def _codes(values: npt.NDArray[np.float32], step: npt.NDArray[np.float64], top: int) -> npt.NDArray[np.int8]:
    return np.clip(np.rint(values / step), -top, top).astype(np.int8)
