"""One parameter's change as the arrays that a delta file stores for it.

Legend: m out features, n in features, N = min(m, n), r rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from compressors.artifact import Array, Kind
from compressors.impart import ImPartConfig, budget_columns, decompose, drop_ratios, sparsify

_BLOCK_ROWS = 8192  # of a vocabulary table at once: bounds the fp32 copies


@dataclass(frozen=True)
class Encoded:
    """A record of a delta file before it is written. bf16 arrays are uint16 bit patterns."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    arrays: dict[str, Array] = field(default_factory=dict)
    rank: int = 0
    tied_to: str | None = None


def encode_projection(name: str, delta: torch.Tensor, config: ImPartConfig) -> Encoded:
    """The delta [m, n] of one projection, fp32: as sparse factors, or as what is smaller or lossless within the budget.

    A zero delta stores nothing. A rank within the budget's floor((1 - a) N) columns is kept whole as two dense factors, with
    no masking. A matrix smaller than its own factors is kept as a dense fp16 delta.
    """
    shape = (delta.shape[0], delta.shape[1])
    if not delta.any():
        return Encoded(name, "zero", shape)
    spectrum = decompose(delta)
    rank, rule = spectrum.true_rank, config.rule_for(name)
    if rank <= budget_columns(shape, config.ratio, rule):
        scaled_u = spectrum.u[:, :rank] * spectrum.s[:rank]
        arrays: dict[str, Array] = {"a": _numpy(spectrum.vt[:rank]), "b": _numpy(scaled_u)}
        return Encoded(name, "lowrank", shape, arrays, rank)
    drops = drop_ratios(spectrum.s[:rank], shape, config.ratio, config.beta, config.c, rule)
    factors = sparsify(spectrum, drops, name, config.seed, config.value_dtype, config.rescale)
    arrays = {
        "coef": factors.coef,
        "keep_u": factors.keep_u,
        "keep_v": factors.keep_v,
        "u_vals": factors.u_vals,
        "v_vals": factors.v_vals,
    }
    if sum(array.nbytes for array in arrays.values()) >= 2 * delta.numel():
        return Encoded(name, "raw", shape, {"delta": _half(delta)})
    return Encoded(name, "impart", shape, arrays, len(factors.coef))


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
