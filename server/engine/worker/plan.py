"""The plan of one engine step: which rows of the batch use which delta. Built once per step, read by every linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class StepPlan:
    """Rows per delta. Linears keep what they derive from a plan as long as the plan is the same object."""

    groups: tuple[tuple[int, npt.NDArray[np.int64]], ...]  # (adapter id, rows [t] ascending)


@dataclass
class Planner:
    """Turns the adapter id of every token row into a plan. Decode steps repeat, so an equal step gives the same object."""

    _ids: tuple[int, ...] = ()
    _plan: StepPlan | None = None

    def plan(self, adapter_ids: Sequence[int]) -> StepPlan | None:
        """`adapter_ids` [T]: 0 for a base row. None when every row is a base row."""
        ids = tuple(adapter_ids)
        if ids != self._ids:
            self._ids = ids
            self._plan = _build(ids)
        return self._plan

    def forget(self) -> None:
        """Drop the remembered step: a delta was loaded or dropped, so what linears derived from it is stale."""
        self._ids, self._plan = (), None


def _build(ids: tuple[int, ...]) -> StepPlan | None:
    rows = np.asarray(ids, dtype=np.int64)
    used = np.unique(rows[rows > 0])
    if not len(used):
        return None
    return StepPlan(tuple((int(adapter), np.flatnonzero(rows == adapter)) for adapter in used))
