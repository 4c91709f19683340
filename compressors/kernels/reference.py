"""The delta product in plain torch, fp32, straight from its definition: what the kernels are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from compressors.execution import SparseFactor
from compressors.factors import Columns
from compressors.kernels.forms import positions_and_values


def dense_factors(factor: SparseFactor) -> tuple[torch.Tensor, torch.Tensor]:
    """U [m, r] times coef, and V [n, r], in fp32."""
    u, v = (
        Columns(start, *positions_and_values(entries), factor.packed).dense(rows)
        for start, entries, rows in (
            (factor.u_start, factor.u_entries, factor.out_features),
            (factor.v_start, factor.v_entries, factor.in_features),
        )
    )
    return torch.from_numpy(u * factor.coef), torch.from_numpy(v)


def dense_delta(factor: SparseFactor) -> torch.Tensor:
    """sum_k coef[k] * U[:, k] V[:, k]^T as fp32 [m, n]."""
    u, v = dense_factors(factor)
    return u @ v.T


def add_deltas(
    y: torch.Tensor,
    x: torch.Tensor,
    parts: Sequence[tuple[Sequence[SparseFactor], npt.NDArray[np.int64]]],
) -> torch.Tensor:
    """A copy of y [T, out] with the deltas of x [T, in] added: (factors, rows [t]) per delta; rounded once, to y's dtype."""
    result = y.float()
    for factors, rows in parts:
        for factor in factors:
            end = factor.out_offset + factor.out_features
            result[rows, factor.out_offset : end] += x[rows].float() @ dense_delta(factor).T
    return result.to(y.dtype)
