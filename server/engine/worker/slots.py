"""The data plane of a GPU: linears hold their deltas in slot tables, and the rows of a step are written once for all of them.

Nothing is decided in a linear, so what it launches is the same in every step, and a CUDA graph of it may be replayed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from compressors.kernels.slots import SlotGroups, SlotNumbers, SlotRows, SlotTable
from server.engine.worker.linear import DeltaLinear, DeltaState, Kernel
from server.engine.worker.plan import StepPlan

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.linear import LinearBase

_RANKS = 2  # times the ranks that one delta can have: room for combinations of lower ranks


@dataclass
class SlotLinear(DeltaLinear):
    """The deltas resident on one linear, in a table. The parts of a combination are added together, so there are no turns."""

    plane: SlotPlane = field(kw_only=True)
    groups: SlotGroups = field(kw_only=True)

    def install(self, adapter: int, parts: tuple[Any, ...]) -> None:
        super().install(adapter, parts)
        self.groups.table.write(self.plane.numbers.take(adapter), _pieces(parts))

    def drop(self, adapter: int) -> None:
        slot = self.plane.numbers.find(adapter)
        if slot is not None:
            self.groups.table.clear(slot)
        super().drop(adapter)

    def add(self, y: torch.Tensor, x: torch.Tensor, plan: StepPlan) -> None:
        """y [T, out] += the deltas of x [T, in], in place, for the rows that the plane was told of."""
        self.plane.kernel.apply(y, x, self.groups)


@dataclass
class SlotPlane:
    """What the linears of one worker share: the kernel, the slots of resident deltas, the rows of the running step."""

    kernel: Kernel
    numbers: SlotNumbers
    rows: SlotRows
    num_slots: int
    device: torch.device
    _plan: StepPlan | None = None

    @classmethod
    def create(cls, vllm_config: VllmConfig, device: torch.device, num_slots: int) -> SlotPlane:
        """Buffers for `num_slots` resident deltas and the largest step. Triton is imported here, and nowhere without a GPU."""
        from compressors.kernels.triton_slots import TritonSlots

        rows = SlotRows(vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.lora_config.max_loras, device)
        return cls(TritonSlots(device), SlotNumbers(num_slots), rows, num_slots, device)

    def linear(self, state: DeltaState, module: LinearBase) -> SlotLinear:
        """The holder of a linear's deltas."""
        sizes = getattr(module, "output_sizes", [module.output_size])  # of the whole weight: so are ranks
        max_rank = _RANKS * sum(min(size, module.input_size) for size in sizes)
        table = SlotTable(self.num_slots, len(sizes), max_rank, self.device)
        return SlotLinear(state, plane=self, groups=SlotGroups(table, self.rows))

    def admit(self, adapter: int, held: Iterable[tuple[DeltaLinear, tuple[Any, ...]]]) -> None:
        """Give an adapter a slot, if all its linears have room for it. Raises SlotError."""
        for linear, parts in held:
            if isinstance(linear, SlotLinear):
                linear.groups.table.check(_pieces(parts))
        self.numbers.take(adapter)

    def begin(self, plan: StepPlan | None) -> None:
        """Write the rows of the coming step; an equal step (the same object) costs nothing. vLLM's dummies add nothing."""
        if plan is self._plan:
            return
        self._plan = plan
        groups = () if plan is None else plan.groups
        found = [(self.numbers.find(adapter), rows) for adapter, rows in groups]
        self.rows.begin([(slot, rows) for slot, rows in found if slot is not None])


def _pieces(parts: tuple[Any, ...]) -> list[Any]:
    return [piece for prepared in parts for piece in prepared]
