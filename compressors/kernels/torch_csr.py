"""The delta product with torch's CSR matrices: the portable form where no C++ compiler is at hand, and the form on GPUs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from compressors.execution import SparseFactor
from compressors.kernels.forms import positions_and_values


@dataclass(frozen=True)
class CsrFactor:
    """V^T [r, n] and U [m, r] as fp32 CSR; coef is folded into U."""

    out_offset: int
    vt: torch.Tensor
    u: torch.Tensor
    nbytes: int
    scale: float = 1.0


class TorchCsr:
    """Adds deltas with two sparse products per delta and part. Accumulates in fp32 (MKL's CSR has no bf16)."""

    name = "torch-csr"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(self, factors: Sequence[SparseFactor]) -> tuple[CsrFactor, ...]:
        """Execution form of all parts of one linear."""
        return tuple(self._csr(factor) for factor in factors)

    def scaled(self, prepared: tuple[CsrFactor, ...], weight: float) -> tuple[CsrFactor, ...]:
        """The same delta times `weight`; the matrices are shared, so it costs nothing."""
        return tuple(replace(factor, nbytes=0, scale=factor.scale * weight) for factor in prepared)

    def nbytes(self, prepared: tuple[CsrFactor, ...]) -> int:
        """Bytes that `prepared` holds."""
        return sum(factor.nbytes for factor in prepared)

    def describe(self, prepared: Iterable[tuple[CsrFactor, ...]]) -> str:
        """The forms that a delta was put into: for the log, once at load."""
        return f"{sum(len(factors) for factors in prepared)} tensors as fp32 CSR"

    def group(
        self, parts: Sequence[tuple[tuple[CsrFactor, ...], npt.NDArray[np.int64]]]
    ) -> list[tuple[tuple[CsrFactor, ...], torch.Tensor]]:
        """What `apply` needs for the deltas of one step on one linear: (prepared, rows [t]) per delta."""
        return [(prepared, torch.from_numpy(rows).to(self.device)) for prepared, rows in parts]

    def apply(self, y: torch.Tensor, x: torch.Tensor, groups: list[tuple[tuple[CsrFactor, ...], torch.Tensor]]) -> None:
        """y [T, m] += delta(x [T, n]) for the rows of each group, in place."""
        for prepared, rows in groups:
            columns = x[rows].float().T.contiguous()
            for factor in prepared:
                added = (factor.u @ (factor.vt @ columns)).T
                if factor.scale != 1.0:
                    added = added * factor.scale
                end = factor.out_offset + added.shape[1]
                y[rows, factor.out_offset : end] = (y[rows, factor.out_offset : end].float() + added).to(y.dtype)

    def _csr(self, factor: SparseFactor) -> CsrFactor:
        v_rows, v_values = positions_and_values(factor.v_entries)
        u_rows, u_values = positions_and_values(factor.u_entries)
        column = np.repeat(np.arange(factor.rank), np.diff(factor.u_start))
        order = np.argsort(u_rows, kind="stable")
        u_start = np.concatenate([[0], np.cumsum(np.bincount(u_rows, minlength=factor.out_features))])
        scaled = (u_values * factor.coef[column])[order]
        vt = _csr_tensor(factor.v_start, v_rows, v_values, (factor.rank, factor.in_features))
        u = _csr_tensor(u_start, column[order], scaled, (factor.out_features, factor.rank))
        index_bytes = 4 * (len(v_rows) + len(u_rows) + factor.rank + factor.out_features + 2)
        nbytes = v_values.nbytes + u_values.nbytes + index_bytes
        return CsrFactor(factor.out_offset, vt.to(self.device), u.to(self.device), nbytes)


def _csr_tensor(
    start: npt.NDArray[np.int64], column: npt.NDArray[np.int64], values: npt.NDArray[np.float32], shape: tuple[int, int]
) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.sparse_csr_tensor(
            torch.from_numpy(start.astype(np.int32)),
            torch.from_numpy(column.astype(np.int32)),
            torch.from_numpy(np.ascontiguousarray(values)),
            size=shape,
            check_invariants=False,
        )
