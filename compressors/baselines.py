"""The methods that ImPart is measured against, as records of the same file, served by the same engine.

| method | paper | here |
|---|---|---|
| LowRank | truncated SVD (ERE, arXiv 2305.18425) | ImPart's record without masks: C = 0 |
| DARE | arXiv 2311.03099: drop entries at random, rescale by 1 / (1 - p) | seeded masks, so that no index is stored |
| BitDelta | arXiv 2402.10193: sign(D) times one scale | scale mean |D|, or one a row; without the distillation of scales |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from compressors.errors import BudgetError
from compressors.factors import spread
from compressors.impart import check_bytes_ratio, check_rows_dtype, check_seed, check_value_dtype
from compressors.masks import factor_rows, layer_seed
from compressors.record import Encoded
from compressors.values import value_bits, value_form

_SPARSE_HEADER = 8  # bytes: count, scale


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
    rows_dtype: str = "int8"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises BudgetError naming the setting."""
        _check(self.ratio, self.bytes_ratio, self.value_dtype)
        check_rows_dtype(self.rows_dtype)
        check_seed(self.seed)


@dataclass(frozen=True)
class BitDeltaConfig:
    """`per_row`: one scale a row of the weight instead of one in all."""

    method: ClassVar[str] = "bitdelta"
    per_row: bool = False
    rows_dtype: str = "int8"

    def __post_init__(self) -> None:
        """Raises BudgetError."""
        check_rows_dtype(self.rows_dtype)


def encode_dare(name: str, delta: torch.Tensor, config: DareConfig) -> Encoded:
    """Entries of the delta [m, n], drawn by seed, as evenly over its columns as whole numbers allow."""
    rows, columns = delta.shape
    values = rows * columns
    count = round(values / config.ratio)
    if config.bytes_ratio is not None:
        count = int((2 * values / config.bytes_ratio - _SPARSE_HEADER) * 8 / value_bits(config.value_dtype))
    count = min(values, max(count, columns))
    keep = spread(count, columns)
    kept_rows = factor_rows(layer_seed(config.seed, name), 0, rows, keep)
    kept = delta.numpy()[kept_rows, np.repeat(np.arange(columns), keep)]
    size = float(np.sqrt(np.mean(kept.astype(np.float64) ** 2))) or 1.0  # fp16 has no room for values as small as these
    scaled = (kept / np.float32(size)).astype(np.float32)
    stored = value_form(config.value_dtype).rounded(scaled, np.array([count], dtype=np.int32))
    bits = tuple((columns, width) for _, width in stored.bits)
    arrays = {
        "count": np.array([count], dtype=np.int32),
        "scale": np.array([size * stored.step[0] * values / count], dtype=np.float32),
        "vals": stored.array,
    }
    return Encoded(name, "sparse", (rows, columns), arrays, bits=bits)


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
