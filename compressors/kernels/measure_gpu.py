"""Times on a GPU: the base's product, dense low-rank pairs of equal bytes, and the Triton kernels, on made-up tensors.

Every product is made once for each of several layers, whose weights together are larger than the GPU's cache, as in a model; all
of a round is one CUDA graph. The base's product is not in the others' times: they are what a delta costs beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
import triton

from compressors.kernels.measure import BASE, Cell, random_factor, rank_for
from compressors.kernels.triton_slots import TritonSlots

LORA, SLOTS = "dense lora", "triton slots"
_CACHES = 4  # sizes of the GPU's cache that the base's weights take


class DenseLora(Protocol):
    """Makes a product of dense pairs ready: y [T, m] += (x [T, n] a[slot]^T) b[slot]^T for the slot of each row, on each call.

    a [slots, r, n], b [slots, m, r] and the slot of each row [T].
    """

    def __call__(
        self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slots: torch.Tensor
    ) -> Callable[[], None]: ...


@dataclass(frozen=True)
class Setting:
    """A weight [out, in], the share of its numbers that each of `deltas` deltas keeps, and the layers that are gone through."""

    shape: tuple[int, int]
    share: float
    deltas: int
    layers: int


def graph_seconds(call: Callable[[], None]) -> float:
    """Seconds of a call, replayed as a CUDA graph."""
    milliseconds: float = triton.testing.do_bench_cudagraph(call)
    return milliseconds / 1e3


def layers_for(shape: tuple[int, int]) -> int:
    """Layers whose bf16 weights do not fit the cache of the GPU."""
    cache: int = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-_CACHES * cache // (2 * shape[0] * shape[1])))


def table(
    device: torch.device,
    setting: Setting,
    densities: Sequence[float],
    row_counts: Sequence[int],
    dense_lora: DenseLora,
    progress: Callable[[int], object] = lambda done: None,
    seconds: Callable[[Callable[[], None]], float] = graph_seconds,
) -> list[Cell]:
    """Microseconds of a layer at each density and number of rows of a delta; `equal_rank` says how dense pairs are sized."""
    (out, size), count = setting.shape, setting.deltas
    weights = [torch.randn(out, size, device=device).bfloat16() for _ in range(setting.layers)]
    kernel, cells = TritonSlots(device), []
    for density in densities:
        rank = rank_for(out, size, setting.share, density)
        deltas = [kernel.prepare([random_factor(out, size, rank, density, seed)]) for seed in range(count)]
        layers = [
            [tuple(replace(piece, buffer=piece.buffer.clone()) for piece in one) for one in deltas]
            for _ in range(setting.layers)
        ]
        dense = equal_rank(kernel.nbytes(deltas[0]), setting.shape)
        pairs = [
            (
                torch.randn(count, dense, size, device=device).bfloat16(),
                torch.randn(count, out, dense, device=device).bfloat16(),
            )
            for _ in range(setting.layers)
        ]
        for rows in row_counts:
            x = torch.randn(rows * count, size, device=device).bfloat16()
            y = torch.zeros(rows * count, out, device=device).bfloat16()
            slots = torch.arange(count, device=device).repeat(rows)
            groups = [
                kernel.group([(one, np.arange(slot, rows * count, count)) for slot, one in enumerate(layer)])
                for layer in layers
            ]
            products: dict[str, list[Callable[[], None]]] = {
                BASE: [partial(_product, x, weight) for weight in weights],
                LORA: [dense_lora(y, x, a, b, slots) for a, b in pairs],
                SLOTS: [partial(kernel.apply, y, x, group) for group in groups if group is not None],
            }
            for form, calls in products.items():
                took = seconds(partial(_all, calls)) / setting.layers
                cells.append(Cell(rows, density, form, took * 1e6))
            progress(1)
    return cells


def equal_rank(nbytes: int, shape: tuple[int, int]) -> int:
    """The rank at which a dense bf16 pair has so many bytes, to the nearest one."""
    return max(1, round(nbytes / (2 * sum(shape))))


def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def gpu_facts() -> dict[str, str]:
    """What the figures are measured on, beside the machine."""
    return {"gpu": torch.cuda.get_device_name(0), "triton": triton.__version__}


def _product(x: torch.Tensor, weight: torch.Tensor) -> None:
    torch.nn.functional.linear(x, weight)


def _all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()
