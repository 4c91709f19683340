"""ImPart: importance-aware sparsification of a delta's singular vectors (arXiv 2504.13237, section 3).

Notation as the paper: D [m, n] = U diag(s) V^T, N = min(m, n). Singular triple k gets a drop probability that grows as s_k falls;
entries of column k of U and of V are dropped independently, survivors rescaled, so that the product stays unbiased.

Where the paper and the authors' released code differ, the code is followed (its results are the published ones), except:
- exact budget for any shape (rule "exact"); the released rules are kept as "attention" and "mlp";
- survivors are rescaled by rows / kept, not 1 / (1 - p), which int() rounding biases by up to 1 %;
- masks come from integer hashes (compressors/masks.py), not from an unseeded generator;
- the delta is formed in fp32, not in the checkpoint's 16-bit dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from compressors.errors import BudgetError
from compressors.mask_codes import code_of
from compressors.masks import factor_rows, layer_seed
from compressors.spectrum import Spectrum
from compressors.values import VALUE_DTYPES, Bits, ValueForm

Rule = Literal["exact", "attention", "mlp"]
ConfigRule = Literal["exact", "released"]
_MLP_SHARE = 1.45  # the released code's 2 * i / (h + i), rounded for one 13B model


def drop_ratios(
    singular_values: Sequence[float] | npt.NDArray[np.floating] | torch.Tensor,
    shape: tuple[int, int],
    ratio: float,
    beta: float,
    c: float,
    rule: Rule,
) -> list[float]:
    """Drop ratio p_k of each of the N = min(shape) singular triples (1 = the whole column goes).

    `shape` is (out, in) of the weight, `ratio` the target compression by surviving values, `beta` the share of triples
    pruned beforehand, `c` the exponent on the singular values. Paper: equations of section 3.2 and algorithm 2, with the
    boundary shift of the released code in closed form. The first column is never dropped. `singular_values` descend; a list
    shorter than N means that the rest are zero, and their share of the budget goes to the others.

    Raises BudgetError for a ratio below 1, a beta outside [0, 1), a negative c, an unknown rule, or values that are no spectrum.
    """
    check_settings(ratio, beta, c)
    sigma = as_spectrum(singular_values, min(shape))
    return allocated(sigma, min(shape), *sparsity_of(shape, ratio, beta, rule), c)


def allocated(sigma: npt.NDArray[np.float64], count: int, sparsity: float, pruned: float, c: float) -> list[float]:
    """Drop ratios of `count` columns for a factor sparsity a and a pruned share b (paper's alpha_uv and beta).

    `sigma` may be shorter than `count`: the rest are zero.
    """
    candidates = max(1, int(count * (1 - pruned)))
    if candidates > len(sigma):
        candidates = len(sigma)
        pruned = 1 - candidates / count
    if sparsity <= pruned:  # pre-pruning alone meets the budget: plain truncation
        kept = min(len(sigma), max(1, _whole_columns(count, sparsity)))
        return [0.0] * kept + [1.0] * (count - kept)
    gamma = (sparsity - pruned) / (1 - pruned)
    weight = sigma[:candidates] ** c
    share = weight / weight[0] if weight[0] > 0 else np.ones(candidates)
    drops = (1 - share) * gamma
    rank = max(1, candidates - _boundary_shift(drops, gamma))
    return [*drops[:rank].tolist(), *[1.0] * (count - rank)]


def budget_columns(shape: tuple[int, int], ratio: float, rule: Rule) -> int:
    """Whole columns of both factors that the budget pays for: floor((1 - a) N). May be 0 for a small matrix."""
    sparsity, _ = sparsity_of(shape, ratio, 0.0, rule)
    return _whole_columns(min(shape), sparsity)


def _whole_columns(count: int, sparsity: float) -> int:
    return int(count * (1 - sparsity) + 1e-9)  # a quotient, so a whole number may come out just below itself


def as_spectrum(
    values: Sequence[float] | npt.NDArray[np.floating] | torch.Tensor, count: int
) -> npt.NDArray[np.float64]:
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    sigma = np.asarray(values, dtype=np.float64).reshape(-1)
    if not 1 <= len(sigma) <= count:
        raise BudgetError(
            f"singular_values has {len(sigma)} entries; a matrix with a shorter side of {count} has 1 to {count}"
        )
    if not np.isfinite(sigma).all() or sigma.min() < 0:
        raise BudgetError("singular_values must be finite and not negative")
    if (np.diff(sigma) > 1e-6 * sigma[0]).any():
        raise BudgetError("singular_values must descend")
    return sigma


def check_settings(ratio: float, beta: float, c: float) -> None:
    if not 1 <= ratio < float("inf"):
        raise BudgetError(f"ratio must be a number >= 1, got {ratio}")
    if not 0 <= beta < 1:
        raise BudgetError(f"beta must be in [0, 1), got {beta}")
    if not 0 <= c < float("inf"):
        raise BudgetError(f"c must be a number >= 0, got {c}")


def check_bytes_ratio(bytes_ratio: float | None) -> None:
    """Raises BudgetError."""
    if bytes_ratio is not None and not 1 <= bytes_ratio < float("inf"):
        raise BudgetError(f"bytes_ratio must be a number >= 1, got {bytes_ratio}")


def check_value_dtype(value_dtype: str) -> None:
    """Raises BudgetError."""
    if value_dtype not in VALUE_DTYPES:
        raise BudgetError(f"unknown value dtype {value_dtype!r}; one of {', '.join(VALUE_DTYPES)}")


def check_rows_dtype(rows_dtype: str) -> None:
    """Raises BudgetError."""
    if rows_dtype not in ("int8", "fp16"):
        raise BudgetError(f"unknown rows dtype {rows_dtype!r}; one of int8, fp16")


def check_released(setting: str, value: str) -> None:
    """A setting that is exact, or as the authors' code has it. Raises BudgetError."""
    if value not in ("exact", "released"):
        raise BudgetError(f"unknown {setting} {value!r}; one of exact, released")


def check_seed(seed: int) -> None:
    """Raises BudgetError."""
    if not 0 <= seed < 1 << 64:
        raise BudgetError(f"seed must be in [0, 2^64), got {seed}")


def sparsity_of(shape: tuple[int, int], ratio: float, beta: float, rule: Rule) -> tuple[float, float]:
    """(a, b): sparsity of each factor averaged over all N columns, and the share of columns pruned beforehand."""
    overall = 1 - 1 / ratio
    if rule == "exact":
        share = max(shape) / (shape[0] + shape[1])
        return 1 - share / ratio, max(0.0, 1 - (1 - beta) * 2 * share)
    if rule == "attention":
        return (1 + overall) / 2, beta
    if rule == "mlp":
        pruned = 1 - _MLP_SHARE * (1 - beta) if beta > 0 else 0.0
        return (2 - _MLP_SHARE + _MLP_SHARE * overall) / 2, max(0.0, pruned)
    raise BudgetError(f"unknown rule {rule!r}; one of exact, attention, mlp")


def _boundary_shift(drops: npt.NDArray[np.float64], gamma: float) -> int:
    """Fewest trailing columns to drop whole so that the mean drop ratio reaches gamma."""
    count = len(drops)
    prefix = np.concatenate([[0.0], np.cumsum(drops)])
    shifts = np.arange(count + 1)
    reached = (prefix[count - shifts] + shifts) / count >= gamma
    return int(np.argmax(reached))


@dataclass(frozen=True)
class SparseFactors:
    """The stored form of one projection's delta: see compressors/artifact.py, kind "impart"."""

    coef: npt.NDArray[np.float32]
    keep_u: npt.NDArray[np.int32]
    keep_v: npt.NDArray[np.int32]
    u_vals: npt.NDArray[np.generic]  # bf16 as uint16 bit patterns
    v_vals: npt.NDArray[np.generic]
    bits: Bits = ()


def kept_counts(drops: npt.NDArray[np.float64], rows: int) -> npt.NDArray[np.int32]:
    """Entries that each column of a factor with so many rows keeps."""
    return (rows - (rows * drops).astype(np.int64)).astype(np.int32)


def sparsify(
    spectrum: Spectrum, drops: Sequence[float], name: str, seed: int, form: ValueForm, rescale: str = "exact"
) -> SparseFactors:
    """Drop entries of the singular vectors and keep the survivors raw; every rescale goes into one coefficient per column.

    `rescale`: "exact" (rows / kept) or "released" (1 / (1 - p)).
    """
    rank = sum(1 for drop in drops if drop < 1)
    drop = np.asarray(drops[:rank], dtype=np.float64)
    triples = spectrum.leading(rank)
    sides, keeps, scale = [], [], triples.s.double().numpy()
    key = layer_seed(seed, name)
    for f, columns in enumerate((triples.u.T, triples.vt)):
        rows = columns.shape[1]
        keep = kept_counts(drop, rows)
        kept = columns.numpy()[np.repeat(np.arange(rank), keep), factor_rows(key, f, rows, keep)]
        stored = form.rounded(kept * np.float32(np.sqrt(rows)), keep)
        grow = rows / keep if rescale == "exact" else 1 / (1 - drop)
        scale *= stored.step * grow / np.sqrt(rows)
        sides.append(stored)
        keeps.append(keep)
    return SparseFactors(scale.astype(np.float32), keeps[0], keeps[1], sides[0].array, sides[1].array, sides[0].bits)


@dataclass(frozen=True)
class ImPartConfig:
    """Settings of one compression. The defaults are the paper's choice at ratio 32, with int8 values.

    `ratio` counts surviving values, as the paper does. `bytes_ratio` counts every byte that a projection takes, and goes before it.
    `rule`: "exact" meets `ratio` for every shape; "released" is the authors' pair of rules, one for attention and one for the rest.
    """

    method: ClassVar[str] = "impart"
    ratio: float = 32.0
    bytes_ratio: float | None = None
    beta: float = 0.6
    c: float = 1.0
    rule: ConfigRule = "exact"
    value_dtype: str = "int8"
    rescale: str = "exact"
    mask: str = "auto"
    seed: int = 0
    rows_dtype: str = "int8"  # of changed vocabulary rows

    def __post_init__(self) -> None:
        """Raises BudgetError naming the setting."""
        check_settings(self.ratio, self.beta, self.c)
        check_released("rule", self.rule)
        check_bytes_ratio(self.bytes_ratio)
        if self.bytes_ratio is not None and self.rule != "exact":
            raise BudgetError("bytes_ratio needs the rule exact: the released rules count values")
        check_value_dtype(self.value_dtype)
        check_rows_dtype(self.rows_dtype)
        check_released("rescale", self.rescale)
        code_of(self.mask)
        check_seed(self.seed)

    def rule_for(self, name: str) -> Rule:
        """The allocator's rule for one projection."""
        return rule_for(self.rule, name)


def rule_for(rule: ConfigRule, name: str) -> Rule:
    """The allocator's rule for one projection: the released code has one for attention and one for the rest."""
    if rule == "exact":
        return "exact"
    return "attention" if "attn" in name or "attention" in name else "mlp"
