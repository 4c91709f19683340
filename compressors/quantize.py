"""ImPart-Qt: sparse singular vectors in 8, 3 and 2 bits (arXiv 2504.13237, section 4, after Delta-CoMe, arXiv 2406.08903).

The columns of both factors are grouped by the order of their singular values: the first 2 in 8 bits, the next 32 in 3, the rest
in 2. The budget counts bits against the 16 of a dense entry, so that the sparsity of the factors is searched for.

Where this differs from the released code:
- codes are symmetric with one step a column, over kept values only: a group of 128 positions with a scale and a zero point, of
  which a seeded mask keeps a tenth, would cost more than its values;
- the accounting "exact" charges the middle group its 3 bits; "released" charges 4, as that code does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from compressors.byte_budget import Price, drops_within
from compressors.encode import as_record, byte_budget, whole_rank
from compressors.errors import BudgetError
from compressors.impart import (
    ConfigRule,
    Rule,
    allocated,
    as_spectrum,
    check_bytes_ratio,
    check_released,
    check_rows_dtype,
    check_seed,
    check_settings,
    rule_for,
    sparsify,
    sparsity_of,
)
from compressors.mask_codes import code_of
from compressors.packing import packed_size
from compressors.record import Encoded
from compressors.spectrum import Spectrum
from compressors.values import Bits, StoredValues, ValueForm, encode_groups

Accounting = Literal["exact", "released"]

_GROUPS = ((2, 8), (32, 3))  # (columns, bits), in the order of the singular values
_REST = 2  # bits
_CHARGED = {"exact": {8: 8, 3: 3, 2: 2}, "released": {8: 8, 3: 4, 2: 2}}
_TOLERANCE = 1e-4  # of the factors' sparsity


def quantised_drop_ratios(
    singular_values: Sequence[float] | npt.NDArray[np.floating] | torch.Tensor,
    shape: tuple[int, int],
    ratio: float,
    beta: float,
    c: float,
    rule: Rule,
    accounting: Accounting = "released",
) -> list[float]:
    """Drop ratio p_k of each of the N = min(shape) singular triples after the budget search (1 = the whole column goes).

    As `compressors.impart.drop_ratios`, but `ratio` is 16 bits an entry of the weight against the bits of the kept values. The
    factors' sparsity a is bisected in [2b - 1, 1] to 1e-4 until sum_k q_k bits_k / (16 N) meets 1 - target, q = 1 - p.
    Raises BudgetError.
    """
    check_settings(ratio, beta, c)
    check_released("accounting", accounting)
    count = min(shape)
    sigma = as_spectrum(singular_values, count)
    target, pruned = sparsity_of(shape, ratio, beta, rule)
    charged = _CHARGED[accounting]
    bits = np.array([charged[width] for width in column_widths(count)])

    def drops(sparsity: float) -> list[float]:
        return allocated(sigma, count, sparsity, pruned, c)

    low, high = 2 * pruned - 1, 1.0
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        paid = float(((1 - np.array(drops(middle))) * bits).sum()) / 16 / count
        if 1 - paid < target:
            low = middle
        else:
            high = middle
    return drops((low + high) / 2)


def column_groups(count: int) -> Bits:
    """(columns, bits) of the first `count` columns."""
    groups = []
    for columns, width in (*_GROUPS, (count, _REST)):
        columns = min(columns, count)
        if columns:
            groups.append((columns, width))
        count -= columns
    return tuple(groups)


def column_widths(count: int) -> list[int]:
    """Bits of each of the first `count` columns."""
    return [width for columns, width in column_groups(count) for _ in range(columns)]


def _rounded(values: npt.NDArray[np.float32], keep: npt.NDArray[np.int32]) -> StoredValues:
    return encode_groups(values, keep, column_groups(len(keep)))


def _nbytes(keep: npt.NDArray[np.integer]) -> int:
    ends = np.cumsum([columns for columns, _ in column_groups(len(keep))])[:-1]
    runs = zip(np.split(keep, ends), column_groups(len(keep)), strict=True)
    return sum(packed_size(int(run.sum(dtype=np.int64)), width) for run, (_, width) in runs)


MIXED = ValueForm(_rounded, _nbytes, lambda columns: np.array(column_widths(columns)))


@dataclass(frozen=True)
class ImPartQtConfig:
    """Settings of one compression; the defaults are the paper's choice.

    `ratio` counts the bits of kept values; `bytes_ratio` counts every byte that a projection takes, and goes before it.
    """

    method: ClassVar[str] = "impart-qt"
    value_dtype: ClassVar[str] = "mixed"
    ratio: float = 32.0
    bytes_ratio: float | None = None
    beta: float = 0.6
    c: float = 1.0
    rule: ConfigRule = "exact"
    accounting: Accounting = "exact"
    rescale: str = "exact"
    mask: str = "auto"
    seed: int = 0
    rows_dtype: str = "int8"  # of changed vocabulary rows

    def __post_init__(self) -> None:
        """Raises BudgetError naming the setting."""
        check_settings(self.ratio, self.beta, self.c)
        check_bytes_ratio(self.bytes_ratio)
        check_released("rule", self.rule)
        check_released("accounting", self.accounting)
        if self.bytes_ratio is not None and (self.rule, self.accounting) != ("exact", "exact"):
            raise BudgetError("bytes_ratio needs the rule and the accounting exact: the released ones count values")
        check_released("rescale", self.rescale)
        code_of(self.mask)
        check_seed(self.seed)
        check_rows_dtype(self.rows_dtype)

    def drops(self, spectrum: Spectrum, name: str, shape: tuple[int, int]) -> list[float]:
        """Drop ratios of one projection within the budget."""
        sigma = spectrum.told_apart
        if self.bytes_ratio is None:
            rule = rule_for(self.rule, name)
            return quantised_drop_ratios(sigma, shape, self.ratio, self.beta, self.c, rule, self.accounting)
        budget = byte_budget(shape, self.bytes_ratio)
        return drops_within(sigma.double().numpy(), shape, budget, self.beta, self.c, Price(MIXED, code_of(self.mask)))

    def keeps_whole(self, spectrum: Spectrum, shape: tuple[int, int]) -> bool:
        """Whether the budget pays for a delta as it is."""
        return spectrum.within(byte_budget(shape, self.bytes_ratio or self.ratio) // (4 * sum(shape)))


def encode_impart_qt(name: str, spectrum: Spectrum, delta: torch.Tensor, config: ImPartQtConfig) -> Encoded:
    """The delta [m, n] of one projection, fp32, rounded to nearest; compressors/gptq.py rounds by activations instead."""
    shape = (delta.shape[0], delta.shape[1])
    if config.keeps_whole(spectrum, shape):
        return whole_rank(name, spectrum, shape)
    drops = config.drops(spectrum, name, shape)
    factors = sparsify(spectrum, drops, name, config.seed, MIXED, config.rescale)
    return as_record(name, factors, delta, config.seed, code_of(config.mask))
