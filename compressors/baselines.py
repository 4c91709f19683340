"""The methods that ImPart is measured against, as records of the same file, served by the same engine.

| method | paper | here |
|---|---|---|
| LowRank | truncated SVD (ERE, arXiv 2305.18425) | ImPart's record without masks: C = 0 |
| DARE | arXiv 2311.03099: drop entries at random, rescale by 1 / (1 - p) | seeded masks, so that no index is stored |
| BitDelta | arXiv 2402.10193: sign(D) times one scale | scale mean |D|, or one a row; tuned on a text by distil.py |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from compressors.artifact import Array
from compressors.errors import BudgetError
from compressors.factors import spread
from compressors.impart import check_bytes_ratio, check_rows_dtype, check_seed, check_value_dtype
from compressors.mask_codes import Code, code_of, encode_mask, mask_bytes
from compressors.masks import factor_rows, layer_seed
from compressors.packing import packed_size
from compressors.record import Encoded
from compressors.values import value_bits, value_form

_SPARSE_HEADER = 8  # bytes: count, scale
_BITMASK_RATIO = 16.0  # of 16 bits an entry to the mask's one


@dataclass(frozen=True)
class LowRankConfig:
    """`ratio` counts values; `bytes_ratio` counts bytes and goes before it."""

    method: ClassVar[str] = "lowrank"
    ratio: float = 32.0
    bytes_ratio: float | None = None
    value_dtype: str = "int8"
    rows_dtype: str = "int8"

    def __post_init__(self) -> None:
        """Raises BudgetError naming the setting."""
        _check(self.ratio, self.bytes_ratio, self.value_dtype)
        check_rows_dtype(self.rows_dtype)


@dataclass(frozen=True)
class DareConfig:
    """`ratio` is 1 / (1 - p): kept entries; `bytes_ratio` counts bytes and goes before it."""

    method: ClassVar[str] = "dare"
    ratio: float = 32.0
    bytes_ratio: float | None = None
    value_dtype: str = "int8"
    mask: str = "auto"
    rows_dtype: str = "int8"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises BudgetError naming the setting."""
        _check(self.ratio, self.bytes_ratio, self.value_dtype)
        check_rows_dtype(self.rows_dtype)
        check_seed(self.seed)
        if code_of(self.mask) == "bitmask" and self.bytes_ratio is not None and self.bytes_ratio >= _BITMASK_RATIO:
            raise BudgetError(
                f"--mask bitmask takes a bit for every entry, so dare stays below --bytes-ratio {_BITMASK_RATIO:g}: "
                "take seeded or gap8"
            )


@dataclass(frozen=True)
class BitDeltaConfig:
    """`per_row`: one scale a row of the weight instead of one in all. `distil`: steps in which they are tuned on a text, whose
    order `seed` gives.
    """

    method: ClassVar[str] = "bitdelta"
    per_row: bool = False
    distil: int = 0
    rows_dtype: str = "int8"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises BudgetError."""
        check_rows_dtype(self.rows_dtype)
        check_seed(self.seed)
        if self.distil < 0:
            raise BudgetError(f"distil must be a number of steps, got {self.distil}")
        if self.seed and not self.distil:
            raise BudgetError("--seed belongs to bitdelta with --distil; nothing else of it is drawn")


def encode_dare(name: str, delta: torch.Tensor, config: DareConfig) -> Encoded:
    """Entries of the delta [m, n], drawn by seed, as evenly over its columns as whole numbers allow."""
    rows, columns = delta.shape
    values = rows * columns
    code = code_of(config.mask)
    count = round(values / config.ratio)
    if config.bytes_ratio is not None:
        count = _affordable((rows, columns), int(2 * values / config.bytes_ratio), config.value_dtype, code)
    count = min(values, max(count, columns))
    keep = spread(count, columns)
    kept_rows = factor_rows(layer_seed(config.seed, name), 0, rows, keep)
    kept = delta.numpy()[kept_rows, np.repeat(np.arange(columns), keep)]
    size = float(np.sqrt(np.mean(kept.astype(np.float64) ** 2))) or 1.0  # fp16 has no room for values as small as these
    scaled = (kept / np.float32(size)).astype(np.float32)
    stored = value_form(config.value_dtype).rounded(scaled, np.array([count], dtype=np.int32))
    bits = tuple((columns, width) for _, width in stored.bits)
    arrays: dict[str, Array] = {
        "count": np.array([count], dtype=np.int32),
        "scale": np.array([size * stored.step[0] * values / count], dtype=np.float32),
        "vals": stored.array,
    }
    if code is not None:
        arrays["mask_u"] = encode_mask(code, kept_rows, keep, rows)
    return Encoded(name, "sparse", (rows, columns), arrays, bits=bits)


def _affordable(shape: tuple[int, int], budget: int, value_dtype: str, code: Code | None) -> int:
    """The most entries that `budget` bytes pay for, their mask included."""
    rows, columns = shape

    def nbytes(count: int) -> int:
        mask = 0.0 if code is None else mask_bytes(code, spread(count, columns), rows).sum()
        return _SPARSE_HEADER + packed_size(count, value_bits(value_dtype)) + int(np.ceil(mask))

    if nbytes(rows * columns) <= budget:
        return rows * columns
    low, high = 0, rows * columns
    while high - low > 1:
        middle = (low + high) // 2
        if nbytes(middle) <= budget:
            low = middle
        else:
            high = middle
    return low


def encode_bitdelta(name: str, delta: torch.Tensor, config: BitDeltaConfig) -> Encoded:
    """Signs of the delta [m, n]; a zero counts as negative, as it does in the authors' code."""
    magnitude = delta.abs().double()
    scale = magnitude.mean(1) if config.per_row else magnitude.mean().reshape(1)
    signs = np.packbits((delta > 0).numpy().reshape(-1), bitorder="little")
    arrays = {"signs": signs, "scale": scale.float().numpy()}
    return Encoded(name, "signs", (delta.shape[0], delta.shape[1]), arrays)


def _check(ratio: float, bytes_ratio: float | None, value_dtype: str) -> None:
    if not 1 <= ratio < float("inf"):
        raise BudgetError(f"ratio must be a number >= 1, got {ratio}")
    check_bytes_ratio(bytes_ratio)
    check_value_dtype(value_dtype)
