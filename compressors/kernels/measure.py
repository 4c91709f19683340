"""Times of the product forms on one made-up tensor: what `choice.py` is set from and `deltaworks bench kernel` prints.

Every tensor of a table has the same number of entries, as a byte budget gives it: the sparser its columns, the higher its rank.
Times are CPU times of one thread, the least of many calls, so that other work on the machine enters little.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from compressors.execution import SparseFactor
from compressors.kernels.choice import ALWAYS, Choice, choose
from compressors.kernels.native import NativeKernel, NativeSparse
from compressors.kernels.torch_csr import TorchCsr

NO_COLUMN = 2.0  # a density that no column reaches
WALKED = ((0.0, ALWAYS),)
FORMS = {  # each puts all columns into one form, or all rows through one product
    "index": Choice(NO_COLUMN, NO_COLUMN, WALKED),
    "mask": Choice(0.0, NO_COLUMN, WALKED),
    "whole": Choice(0.0, 0.0, WALKED),
    "decoded": Choice(0.0, NO_COLUMN, ()),
    "expanded fp32": Choice(0.0, NO_COLUMN, WALKED, ((0.0, 1),)),
    "expanded bf16": Choice(0.0, NO_COLUMN, WALKED, ((0.0, 1),), dense_bf16=True),
}
CHOSEN, CSR, BASE = "chosen", "torch csr", "base gemm"
_MIN_CALLS, _MAX_CALLS, _SECONDS = 5, 400, 0.15


@dataclass(frozen=True)
class Cell:
    """One measured product: microseconds of a call."""

    rows: int
    density: float
    form: str
    microseconds: float


def random_factor(out: int, size: int, rank: int, density: float, seed: int = 0) -> SparseFactor:
    """Int8 values at random places, the same number in each column: U [out, rank], V [size, rank]."""
    generator = np.random.default_rng(seed)

    def side(rows: int) -> tuple[np.ndarray, np.ndarray]:
        keep = max(1, round(density * rows))
        index = np.sort(np.argsort(generator.random((rank, rows)), axis=1)[:, :keep], axis=1).astype(np.uint32)
        values = generator.integers(-127, 128, index.shape).astype(np.float32)
        return np.arange(rank + 1, dtype=np.int64) * keep, (values.view(np.uint32) | index).reshape(-1)

    (v_start, v_entries), (u_start, u_entries) = side(size), side(out)
    coef = generator.standard_normal(rank).astype(np.float32) / 1e4
    return SparseFactor(out, size, 0, coef, v_start, u_start, v_entries, u_entries)


def rank_for(out: int, size: int, share: float, density: float) -> int:
    """The rank at which columns of this density hold `share` of the weight's numbers, at most min(out, size)."""
    return max(1, min(out, size, round(share * out * size / ((out + size) * density))))


def table(
    kernel: NativeKernel,
    level: int,
    shape: tuple[int, int],
    share: float,
    densities: Sequence[float],
    row_counts: Sequence[int],
    progress: Callable[[int], object] = lambda done: None,
) -> list[Cell]:
    """All forms, torch's CSR and the base's product (bf16) at each density and number of rows; shape [out, in]."""
    torch.set_num_threads(1)
    out, size = shape
    weight = torch.randn(out, size).bfloat16()
    cells = []
    for density in densities:
        factor = random_factor(out, size, rank_for(out, size, share, density), density)
        forms: dict[str, Any] = {
            **{name: NativeSparse(kernel, 1, level, choice) for name, choice in FORMS.items()},
            CHOSEN: NativeSparse(kernel, 1, level, choose(level)),
            CSR: TorchCsr(torch.device("cpu")),
        }
        prepared = {name: form.prepare([factor]) for name, form in forms.items()}
        for rows in row_counts:
            x, y = torch.randn(rows, size).bfloat16(), torch.randn(rows, out).bfloat16()
            cells.append(Cell(rows, density, BASE, _least(partial(torch.nn.functional.linear, x, weight))))
            for name, form in forms.items():
                groups = form.group([(prepared[name], np.arange(rows))])
                cells.append(Cell(rows, density, name, _least(partial(form.apply, y, x, groups))))
            progress(1)
    return cells


def _least(call: Callable[[], object]) -> float:
    call()
    best, spent, calls = float("inf"), 0.0, 0
    while calls < _MIN_CALLS or (spent < _SECONDS and calls < _MAX_CALLS):
        started = time.thread_time()
        call()
        took = time.thread_time() - started
        best, spent, calls = min(best, took), spent + took, calls + 1
    return best * 1e6
