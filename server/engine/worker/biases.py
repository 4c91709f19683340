"""Biases of a fine-tune: what its linears add to the rows of a delta beside the base's bias. y [T, out]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, RowParallelLinear

from server.engine.worker.ops import define_op
from server.engine.worker.placement import PlacementError
from server.engine.worker.rows import StepRows


@dataclass(eq=False)
class DeltaBias:
    """The bias changes resident on one linear, fp32 [out of this worker] by adapter; parts of a fused linear in one vector."""

    module: LinearBase
    rows: StepRows
    resident: dict[int, torch.Tensor] = field(default_factory=dict)

    def prepare(self, known: torch.Tensor | None, delta: torch.Tensor, start: int, end: int, at: int) -> torch.Tensor:
        """`known` (or zeros) plus rows [start, end) of `delta`, placed at row `at` of this worker's output."""
        if getattr(self.module, "skip_bias_add", False):
            raise PlacementError("a bias that its layer leaves to be added elsewhere is not served per request")
        bias: torch.Tensor = self.module.bias
        change = torch.zeros(bias.shape, device=bias.device) if known is None else known
        if (
            isinstance(self.module, RowParallelLinear) and self.module.tp_rank > 0
        ):  # rank 0 adds it, before the all-reduce
            return change
        change[at : at + end - start] += delta[start:end].to(bias.device)
        return change

    def add(self, y: torch.Tensor) -> None:
        for adapter, rows in self.rows.groups:
            change = self.resident.get(adapter)
            if change is not None:
                y.index_copy_(0, rows, (y.index_select(0, rows).float() + change).to(y.dtype))


class BiasMethod(LinearMethodBase):  # type: ignore[misc]  # vLLM's classes are untyped for us
    """Wraps the quant method of one linear that has a bias."""

    def __init__(self, inner: LinearMethodBase, bias: DeltaBias, key: str) -> None:
        self.inner = inner
        self.bias = bias
        self.key = key

    def create_weights(self, layer: torch.nn.Module, *args: Any, **extra_weight_attrs: Any) -> None:
        self.inner.create_weights(layer, *args, **extra_weight_attrs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.inner.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = self.inner.apply(layer, x, bias)
        if torch.compiler.is_compiling():
            torch.ops.deltaworks.add_bias(y, self.key)
        elif self.bias.rows.plan is not None:
            self.bias.add(y)
        return y


def wrap_biases(model: torch.nn.Module, rows: StepRows, forward_context: dict[str, Any]) -> dict[str, DeltaBias]:
    """Wrap the linears of `model` that have a bias; returns them by module name."""
    define_op(add_bias, changes="y")
    wrapped = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase) and getattr(module, "bias", None) is not None:
            bias = DeltaBias(module, rows)
            key = f"deltaworks.bias.{name}"
            module.quant_method = BiasMethod(module.quant_method, bias, key)
            forward_context[key] = bias
            wrapped[name] = bias
    return wrapped


def add_bias(y: torch.Tensor, name: str) -> None:
    """The op of compiled graphs; `name` is the bias's key in vLLM's layer table."""
    bias: DeltaBias = get_forward_context().no_compile_layers[name]
    if bias.rows.plan is not None:
        bias.add(y)
