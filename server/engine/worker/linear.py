"""The data plane: every linear of the model computes its base product as before, then adds the deltas of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase

from compressors.execution import SparseFactor
from server.engine.worker.ops import define_op
from server.engine.worker.plan import StepPlan


class Kernel(Protocol):
    """A product form: `native-sparse` in C++, `torch-csr`, or `triton-slots` on GPUs.

    What `prepare` and `group` return is its own affair.
    """

    name: str

    def prepare(self, factors: Sequence[SparseFactor]) -> Any:
        """Execution form of all parts of one linear for one delta."""
        ...

    def scaled(self, prepared: Any, weight: float) -> Any:
        """The same delta times `weight`, which shares what it can with `prepared`."""
        ...

    def nbytes(self, prepared: Any) -> int: ...

    def describe(self, prepared: Iterable[Any]) -> str:
        """The forms that a delta was put into: for the log, once at load."""
        ...

    def group(self, parts: Sequence[tuple[Any, npt.NDArray[np.int64]]]) -> Any:
        """What `apply` needs for the deltas of one step on one linear: (prepared, rows [t]) per delta.

        None when there is nothing to add.
        """
        ...

    def apply(self, y: torch.Tensor, x: torch.Tensor, groups: Any) -> None:
        """y [T, out] += the deltas of x [T, in], in place, for the rows of each group."""
        ...


@dataclass
class DeltaState:
    """What the linears of one worker share: the kernel and the plan of the step that is running (None: base rows only)."""

    kernel: Kernel
    plan: StepPlan | None = None


@dataclass
class DeltaLinear:
    """The deltas resident on one linear layer, by adapter id, in the kernel's execution form: one, or the parts of a combination.

    The parts of a combination are added in turns, part i of every row together: two of one row at once would race.
    """

    state: DeltaState
    resident: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    _plan: StepPlan | None = None
    _turns: tuple[Any, ...] = ()

    def install(self, adapter: int, parts: tuple[Any, ...]) -> None:
        """Make a delta resident here; one that has nothing here need not be."""
        self.resident[adapter] = parts

    def drop(self, adapter: int) -> None:
        self.resident.pop(adapter, None)

    def add(self, y: torch.Tensor, x: torch.Tensor, plan: StepPlan) -> None:
        """y [T, out] += the deltas of x [T, in], in place, for the rows that `plan` names."""
        if plan is not self._plan:
            self._turns = self._grouped(plan)
            self._plan = plan
        for groups in self._turns:
            self.state.kernel.apply(y, x, groups)

    def forget(self) -> None:
        """Drop what was derived from the last plan, so that no pointer outlives the delta behind it."""
        self._plan, self._turns = None, ()

    def _grouped(self, plan: StepPlan) -> tuple[Any, ...]:
        turns: list[list[tuple[Any, npt.NDArray[np.int64]]]] = []
        for adapter, rows in plan.groups:
            for i, prepared in enumerate(self.resident.get(adapter, ())):
                if i == len(turns):
                    turns.append([])
                turns[i].append((prepared, rows))
        grouped = (self.state.kernel.group(parts) for parts in turns)
        return tuple(groups for groups in grouped if groups is not None)


class DeltaLinearMethod(LinearMethodBase):  # type: ignore[misc]  # vLLM's classes are untyped for us
    """Wraps the quant method of one linear, whatever it is: plain, packed for the CPU, or quantised.

    In RowParallelLinear `apply` runs before the all-reduce and in ColumnParallelLinear before the gather, so adding a
    shard's part of the delta here is right by linearity.
    """

    def __init__(self, inner: LinearMethodBase, linear: DeltaLinear, name: str) -> None:
        self.inner = inner
        self.linear = linear
        self.name = name

    def create_weights(self, layer: torch.nn.Module, *args: Any, **extra_weight_attrs: Any) -> None:
        self.inner.create_weights(layer, *args, **extra_weight_attrs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.inner.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = self.inner.apply(layer, x, bias)
        if torch.compiler.is_compiling():  # a graph is replayed with other plans, so the op must always be in it
            torch.ops.deltaworks.add_delta(y, x, self.name)
            return y
        plan = self.linear.state.plan
        if plan is not None:
            self.linear.add(y, x, plan)
        return y


def wrap_linears(
    model: torch.nn.Module, forward_context: dict[str, Any], deltas_of: Callable[[LinearBase], DeltaLinear]
) -> Mapping[str, tuple[LinearBase, DeltaLinear]]:
    """Wrap the quant method of every linear of `model`; returns them by module name.

    `deltas_of` makes the holder of a linear's deltas. `forward_context` is vLLM's layer table (`static_forward_context`), where the
    op of compiled graphs finds its linear.
    """
    wrapped = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            linear = deltas_of(module)
            key = f"deltaworks.{name}"
            module.quant_method = DeltaLinearMethod(module.quant_method, linear, key)
            forward_context[key] = linear
            wrapped[name] = (module, linear)
    return wrapped


def add_delta(y: torch.Tensor, x: torch.Tensor, name: str) -> None:
    """The op of compiled graphs; `name` is the linear's key in vLLM's layer table."""
    linear: DeltaLinear = get_forward_context().no_compile_layers[name]
    plan = linear.state.plan
    if plan is not None:
        linear.add(y, x, plan)


def op_library() -> torch.library.Library:
    """Defines `deltaworks::add_delta`."""
    return define_op(add_delta, changes="y")
