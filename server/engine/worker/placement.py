"""Where a weight of the checkpoint lives in this worker: the linear, its place in a fused one, its tensor-parallel shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.utils import get_packed_modules_mapping

from compressors.execution import Shard


class PlacementError(Exception):
    """A weight of the delta has no linear in the served model; the message names it."""


@dataclass(frozen=True)
class Place:
    """A linear of this worker (by module name) and the shard of the weight that it holds."""

    linear: str
    shard: Shard


class Placement:
    """Maps checkpoint weight names to places, for one model on one worker."""

    def __init__(self, model: torch.nn.Module, linears: Mapping[str, LinearBase]) -> None:
        self._linears = linears
        packed = get_packed_modules_mapping(model)
        self._fused = {
            part: (fused, i) for fused, parts in packed.items() for i, part in enumerate(parts) if len(parts) > 1
        }
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        self._mapper: Any = mapper.get_rename_mapper() if mapper is not None else None

    def place(self, name: str, shape: tuple[int, int]) -> Place:
        """Place of the weight `name` [out, in]; a suffix `#i` names part i of a weight that the checkpoint stores fused."""
        weight, _, part = name.partition("#")
        module = self.module_name(weight)
        index: int | None = int(part) if part else None
        if module not in self._linears:
            parent, _, leaf = module.rpartition(".")
            fused, index = self._fused.get(leaf, ("", None))
            module = f"{parent}.{fused}"
        if module not in self._linears:
            raise PlacementError(f"{name}: the served model has no linear layer for this weight")
        linear = self._linears[module]
        shard = _shard(linear, index, shape)
        high = (shard.out_range[1], shard.in_range[1])
        if high[0] > shape[0] or high[1] > shape[1]:
            raise PlacementError(f"{name}: the delta has shape {list(shape)}, too small for the served layer {module}")
        return Place(module, shard)

    def module_name(self, parameter: str) -> str:
        """Name of the served module that holds a parameter of the checkpoint, were it not fused."""
        name = parameter.removesuffix(".weight").removesuffix(".bias")
        return name if self._mapper is None else str(self._mapper._map_name(name))


def _shard(linear: LinearBase, index: int | None, shape: tuple[int, int]) -> Shard:
    out, size = shape[0], shape[1]
    if isinstance(linear, RowParallelLinear):
        width: int = linear.input_size_per_partition
        return Shard((0, out), (linear.tp_rank * width, (linear.tp_rank + 1) * width))
    if isinstance(linear, QKVParallelLinear) and index is not None:
        return _qkv_shard(linear, index, size)
    if isinstance(linear, ColumnParallelLinear):
        sizes = (
            [total // linear.tp_size for total in linear.output_sizes] if index is not None else [out // linear.tp_size]
        )
        rows = sizes[index or 0]
        return Shard((linear.tp_rank * rows, (linear.tp_rank + 1) * rows), (0, size), sum(sizes[: index or 0]))
    return Shard((0, out), (0, size))


def _qkv_shard(linear: QKVParallelLinear, index: int, size: int) -> Shard:
    """With fewer KV heads than ranks several ranks hold the same KV head."""
    rows = (
        linear.num_heads * linear.head_size,
        linear.num_kv_heads * linear.head_size,
        linear.num_kv_heads * linear.v_head_size,
    )
    rank = linear.tp_rank if index == 0 else linear.tp_rank // linear.num_kv_head_replicas
    return Shard((rank * rows[index], (rank + 1) * rows[index]), (0, size), sum(rows[:index]))
