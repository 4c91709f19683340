"""One parameter's change as the arrays that a delta file stores for it.

Legend: m out features, n in features, N = min(m, n), r rank.
"""

from __future__ import annotations

import numpy as np
import torch

from compressors.artifact import Array
from compressors.baselines import LowRankConfig
from compressors.byte_budget import drops_within
from compressors.impart import ImPartConfig, Spectrum, budget_columns, decompose, drop_ratios, sparsify
from compressors.record import Encoded

_BLOCK_ROWS = 8192  # of a vocabulary table at once: bounds the fp32 copies


def encode_impart(name: str, delta: torch.Tensor, config: ImPartConfig) -> Encoded:
    """The delta [m, n] of one projection, fp32: as sparse factors, or as what is smaller or lossless within the budget.

    A rank within the budget's floor((1 - a) N) columns is kept whole as two dense factors, with no masking. A matrix smaller
    than its own factors is kept as a dense fp16 delta.
    """
    return encode_spectrum(name, decompose(delta), delta, config)


def encode_spectrum(name: str, spectrum: Spectrum, delta: torch.Tensor, config: ImPartConfig) -> Encoded:
    """`encode_impart` of a delta whose spectrum is known."""
    shape = (delta.shape[0], delta.shape[1])
    rank = spectrum.true_rank
    if _whole_rank_fits(rank, name, shape, config):
        scaled_u = spectrum.u[:, :rank] * spectrum.s[:rank]
        arrays: dict[str, Array] = {"a": _numpy(spectrum.vt[:rank]), "b": _numpy(scaled_u)}
        return Encoded(name, "lowrank", shape, arrays, rank)
    drops = _drops(spectrum.s[:rank], name, shape, config)
    factors = sparsify(spectrum, drops, name, config.seed, config.value_dtype, config.rescale)
    arrays = {
        "coef": factors.coef,
        "keep_u": factors.keep_u,
        "keep_v": factors.keep_v,
        "u_vals": factors.u_vals,
        "v_vals": factors.v_vals,
    }
    encoded = Encoded(name, "impart", shape, arrays, len(factors.coef), bits=factors.bits)
    return encoded if encoded.nbytes < 2 * delta.numel() else Encoded(name, "raw", shape, {"delta": _half(delta)})


def encode_lowrank(name: str, delta: torch.Tensor, config: LowRankConfig) -> Encoded:
    """Rank truncation: ImPart with C = 0 prunes no entry of a kept column."""
    as_impart = ImPartConfig(
        ratio=config.ratio, bytes_ratio=config.bytes_ratio, beta=0.0, c=0.0, value_dtype=config.value_dtype
    )
    return encode_impart(name, delta, as_impart)


def _whole_rank_fits(rank: int, name: str, shape: tuple[int, int], config: ImPartConfig) -> bool:
    if config.bytes_ratio is not None:
        return 4 * rank * sum(shape) <= _budget(shape, config.bytes_ratio)
    return rank <= budget_columns(shape, config.ratio, config.rule_for(name))


def _drops(sigma: torch.Tensor, name: str, shape: tuple[int, int], config: ImPartConfig) -> list[float]:
    if config.bytes_ratio is None:
        return drop_ratios(sigma, shape, config.ratio, config.beta, config.c, config.rule_for(name))
    budget = _budget(shape, config.bytes_ratio)
    return drops_within(sigma.double().numpy(), shape, budget, config.beta, config.c, config.value_dtype)


def _budget(shape: tuple[int, int], bytes_ratio: float) -> int:
    return int(2 * shape[0] * shape[1] / bytes_ratio)


def encode_rows(name: str, before: torch.Tensor, after: torch.Tensor) -> Encoded:
    """A vocabulary table [rows, width], as stored: changed rows as deltas and rows past the base's last one whole.

    Row values are fp16 (fp32 where one would overflow).
    """
    index, rows = _changed_rows(before, after, torch.float16)
    if not len(index):
        return Encoded(name, "zero", tuple(after.shape))
    if not torch.isfinite(rows).all():
        index, rows = _changed_rows(before, after, torch.float32)
    arrays = {"row_idx": index.numpy().astype(np.int32), "row_delta": _numpy(rows)}
    return Encoded(name, "rows", tuple(after.shape), arrays)


def encode_raw(name: str, before: torch.Tensor, after: torch.Tensor) -> Encoded:
    """Norms, biases and other small parameters, as stored: the whole delta, in fp16 where that restores `after` exactly."""
    base = before.float()
    delta = after.float() - base
    if not delta.any():
        return Encoded(name, "zero", tuple(after.shape))
    half = delta.half()
    exact = torch.equal((base + half.float()).to(after.dtype), after)
    return Encoded(name, "raw", tuple(after.shape), {"delta": _numpy(half if exact else delta)})


def _changed_rows(before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    known = before.shape[0]
    indices, rows = [], []
    for start in range(0, after.shape[0], _BLOCK_ROWS):
        block = after[start : start + _BLOCK_ROWS].to(torch.float32, copy=True)
        shared = max(0, min(known - start, len(block)))
        block[:shared] -= before[start : start + shared].float()
        changed = (block != 0).any(1)
        changed[shared:] = True
        indices.append(changed.nonzero()[:, 0] + start)
        rows.append(block[changed].to(dtype))
    return torch.cat(indices), torch.cat(rows)


def _half(values: torch.Tensor) -> Array:
    """fp16 where it holds the values, else fp32."""
    half = values.half()
    return _numpy(half if torch.isfinite(half).all() else values)


def _numpy(values: torch.Tensor) -> Array:
    array: Array = values.contiguous().numpy()
    return array
