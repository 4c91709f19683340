"""One parameter's change as the arrays that a delta file stores for it.

Legend: m out features, n in features, N = min(m, n), r rank.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from compressors.artifact import Array
from compressors.baselines import LowRankConfig
from compressors.byte_budget import Price, drops_within
from compressors.impart import (
    ImPartConfig,
    SparseFactors,
    budget_columns,
    drop_ratios,
    sparsify,
)
from compressors.mask_codes import Code, code_of, encode_mask
from compressors.masks import factor_rows, layer_seed
from compressors.record import Encoded
from compressors.spectrum import Spectrum
from compressors.values import ValueForm, value_form

_BLOCK_ROWS = 4096  # of a vocabulary table at once: bounds the fp32 copies
_INT8_ERROR = 0.02  # of a table's norm; normal rows lose about 0.8 %


def encode_impart(name: str, spectrum: Spectrum, delta: torch.Tensor, config: ImPartConfig) -> Encoded:
    """The delta [m, n] of one projection, fp32: as sparse factors, or as what is smaller or lossless within the budget.

    A rank within the budget's floor((1 - a) N) columns is kept whole as two dense factors, with no masking. A matrix smaller
    than its own factors is kept as a dense fp16 delta.
    """
    shape = (delta.shape[0], delta.shape[1])
    if spectrum.within(_whole_rank(name, shape, config)):
        return whole_rank(name, spectrum, shape)
    form = value_form(config.value_dtype)
    drops = _drops(spectrum.told_apart, name, shape, config, form)
    factors = sparsify(spectrum, drops, name, config.seed, form, config.rescale)
    return as_record(name, factors, delta, config.seed, code_of(config.mask))


def whole_rank(name: str, spectrum: Spectrum, shape: tuple[int, int]) -> Encoded:
    """A delta of low rank without loss: two dense fp32 factors."""
    rank = spectrum.true_rank
    triples = spectrum.leading(rank)
    arrays: dict[str, Array] = {"a": _numpy(triples.vt), "b": _numpy(triples.u * triples.s)}
    return Encoded(name, "lowrank", shape, arrays, rank)


def as_record(name: str, factors: SparseFactors, delta: torch.Tensor, seed: int, code: Code | None) -> Encoded:
    """Sparse factors as a record, or the delta itself where that is smaller. With a `code` the seed's masks are written out."""
    shape = (delta.shape[0], delta.shape[1])
    arrays: dict[str, Array] = {
        "coef": factors.coef,
        "keep_u": factors.keep_u,
        "keep_v": factors.keep_v,
        "u_vals": factors.u_vals,
        "v_vals": factors.v_vals,
    }
    if code is not None:
        keys = enumerate(zip("uv", (factors.keep_u, factors.keep_v), strict=True))
        arrays |= {f"mask_{label}": written_mask(code, seed, name, side, shape, keep) for side, (label, keep) in keys}
    encoded = Encoded(name, "impart", shape, arrays, len(factors.coef), bits=factors.bits)
    return encoded if encoded.nbytes < 2 * delta.numel() else Encoded(name, "raw", shape, {"delta": _half(delta)})


def written_mask(
    code: Code, seed: int, name: str, side: int, shape: tuple[int, int], keep: npt.NDArray[np.int32]
) -> Array:
    """The rows that the seed draws for one factor (side 0 = U, 1 = V), as bytes."""
    return encode_mask(code, factor_rows(layer_seed(seed, name), side, shape[side], keep), keep, shape[side])


def encode_lowrank(name: str, spectrum: Spectrum, delta: torch.Tensor, config: LowRankConfig) -> Encoded:
    """Rank truncation: ImPart with C = 0 prunes no entry of a kept column."""
    as_impart = ImPartConfig(
        ratio=config.ratio, bytes_ratio=config.bytes_ratio, beta=0.0, c=0.0, value_dtype=config.value_dtype
    )
    return encode_impart(name, spectrum, delta, as_impart)


def _whole_rank(name: str, shape: tuple[int, int], config: ImPartConfig) -> int:
    """The highest rank that the budget pays for as it is."""
    if config.bytes_ratio is not None:
        return byte_budget(shape, config.bytes_ratio) // (4 * sum(shape))
    return budget_columns(shape, config.ratio, config.rule_for(name))


def _drops(
    sigma: torch.Tensor, name: str, shape: tuple[int, int], config: ImPartConfig, form: ValueForm
) -> list[float]:
    if config.bytes_ratio is None:
        return drop_ratios(sigma, shape, config.ratio, config.beta, config.c, config.rule_for(name))
    budget = byte_budget(shape, config.bytes_ratio)
    price = Price(form, code_of(config.mask))
    return drops_within(sigma.double().numpy(), shape, budget, config.beta, config.c, price)


def byte_budget(shape: tuple[int, int], bytes_ratio: float) -> int:
    """Bytes of one projection [m, n] at this ratio to 16 bits an entry."""
    return int(2 * shape[0] * shape[1] / bytes_ratio)


class Rows(Protocol):
    """A vocabulary table [rows, width], in memory or read as it is needed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> torch.Tensor: ...


def encode_rows(name: str, before: Rows, after: Rows, dtype: str = "int8") -> Encoded:
    """A vocabulary table [rows, width], as stored: changed rows as deltas and rows past the base's last one whole."""
    index, rows = _changed_rows(before, after)
    return encode_changed_rows(name, tuple(after.shape), index, rows, dtype)


def encode_changed_rows(
    name: str, shape: tuple[int, ...], index: torch.Tensor, rows: torch.Tensor, dtype: str
) -> Encoded:
    """Ascending numbers [t] of changed rows and their fp32 values [t, width].

    Values are int8 with one fp32 scale per row (its largest value / 127), fp16 or fp32; fp16 also where int8 would cost the
    table more than 2 % (rows with outliers) or holds what fp32 would, and fp32 where fp16 would overflow.
    """
    if not len(index):
        return Encoded(name, "zero", shape)
    arrays: dict[str, Array] = {"row_idx": index.numpy().astype(np.int32)}
    rounded = _int8_rows(rows) if dtype == "int8" else None
    if rounded is not None:
        arrays |= {"row_delta": _numpy(rounded[0]), "row_scale": _numpy(rounded[1])}
    else:
        arrays["row_delta"] = exact_half(rows) if dtype == "fp32" else _half(rows)
    return Encoded(name, "rows", shape, arrays)


def _int8_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rows [t, width] as int8 [t, width] and scales fp32 [t]; None where that is further than `_INT8_ERROR` from them."""
    scales = rows.abs().amax(1) / 127
    values = torch.empty(rows.shape, dtype=torch.int8)
    error = torch.zeros(())
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        scale = scales[block].where(scales[block] > 0, torch.ones(()))[:, None]
        nearest = (rows[block] / scale).round()
        error += (nearest * scale - rows[block]).square().sum()
        values[block] = nearest.to(torch.int8)
    return (values, scales) if error.sqrt() <= _INT8_ERROR * rows.norm() else None


def encode_raw(name: str, before: torch.Tensor, after: torch.Tensor) -> Encoded:
    """Norms, biases and other small parameters, as stored: the whole delta, in fp16 where that restores `after` exactly."""
    base = before.float()
    delta = after.float() - base
    if not delta.any():
        return Encoded(name, "zero", tuple(after.shape))
    half = delta.half()
    exact = torch.equal((base + half.float()).to(after.dtype), after)
    return Encoded(name, "raw", tuple(after.shape), {"delta": _numpy(half if exact else delta)})


def _changed_rows(before: Rows, after: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending numbers [t] of the changed and the new rows, and their fp32 values [t, width]."""
    known = before.shape[0]
    indices, rows = [], []
    for start in range(0, after.shape[0], _BLOCK_ROWS):
        block = after[start : start + _BLOCK_ROWS].to(torch.float32, copy=True)
        shared = max(0, min(known - start, len(block)))
        block[:shared] -= before[start : start + shared].float()
        changed = (block != 0).any(1)
        changed[shared:] = True
        indices.append(changed.nonzero()[:, 0] + start)
        rows.append(block[changed])
    return torch.cat(indices), torch.cat(rows)


def encode_dense(name: str, delta: torch.Tensor, dtype: str) -> Encoded:
    """A delta fp32 as it is, in fp16 or bf16, or in "fp32": then in fp16 all the same where that loses nothing."""
    shape = tuple(delta.shape)
    if not delta.any():
        return Encoded(name, "zero", shape)
    if dtype == "bf16":
        return Encoded(name, "raw", shape, {"delta": delta.bfloat16().view(torch.int16).numpy().view(np.uint16)})
    return Encoded(name, "raw", shape, {"delta": exact_half(delta) if dtype == "fp32" else _half(delta)})


def exact_half(values: torch.Tensor) -> Array:
    """fp16 where that is every value exactly, else fp32."""
    half = values.half()
    return _numpy(half if torch.equal(half.float(), values) else values)


def _half(values: torch.Tensor) -> Array:
    """fp16 where it holds the values, else fp32."""
    half = values.half()
    return _numpy(half if torch.isfinite(half).all() else values)


def _numpy(values: torch.Tensor) -> Array:
    array: Array = values.contiguous().numpy()
    return array
