"""The rows of the running step by delta, as tensors: what everything outside the linear projections computes from."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from server.engine.worker.plan import StepPlan


@dataclass
class StepRows:
    """Shared by the layers of one worker. `plan` is None while every row is a base row, so that an idle layer does nothing.

    A layer keeps what it derives from `groups` as long as `plan` is the same object; its rows lie on the model's device.
    """

    device: torch.device
    plan: StepPlan | None = None
    groups: tuple[tuple[int, torch.Tensor], ...] = field(default=())  # (adapter id, rows int64 [t])

    def begin(self, plan: StepPlan | None) -> None:
        """Set the plan of the coming step; an equal step (the same object) costs nothing."""
        if plan is self.plan:
            return
        self.plan = plan
        self.groups = () if plan is None else tuple((a, torch.from_numpy(r).to(self.device)) for a, r in plan.groups)
