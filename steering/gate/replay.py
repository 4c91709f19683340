"""A policy's cascade over label rows, whose features and token counts stand for what the probes would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steering.errors import FitError
from steering.gate.cascade import NEVER, Cascade, Verdict, Walk, begin, observe
from steering.gate.features import GATEABLE
from steering.gate.labels import LabelRow
from steering.gate.measures import Array
from steering.gate.policy import Mixed
from steering.gate.threshold import GRID

_WANTED: dict[Mixed, str] = {
    "narrow": "a lookup or compute tool",
    "allow": "lookup and compute tools alone",
}


@dataclass(frozen=True)
class Columns:
    """Rows as columns: y known (p_known >= r), w weights 1 / propensity, and the outcomes of the greedy runs."""

    y: Array
    w: Array
    without: npt.NDArray[np.bool_]
    with_tools: npt.NDArray[np.bool_]
    called: npt.NDArray[np.bool_]
    calls: Array

    @classmethod
    def of(cls, rows: Sequence[LabelRow], r: float) -> Columns:
        return cls(
            y=np.array([row.p_known >= r for row in rows], dtype=float),
            w=np.array([1 / row.propensity for row in rows]),
            without=np.array([row.correct_without for row in rows], dtype=bool),
            with_tools=np.array([row.correct_with for row in rows], dtype=bool),
            called=np.array([row.called for row in rows], dtype=bool),
            calls=np.array([row.calls for row in rows], dtype=float),
        )

    @property
    def harmful(self) -> npt.NDArray[np.bool_]:
        """Wrong without tools and right with them: suppressing such a row is harm."""
        return ~self.without & self.with_tools


def acted_on(rows: Sequence[LabelRow], mixed: Mixed) -> list[LabelRow]:
    """The rows that a score may act on. Raises FitError where there is none."""
    found = [row for row in rows if row.gateable and (mixed == "narrow" or set(row.kinds.values()) <= set(GATEABLE))]
    if not found:
        raise FitError(f"no row has {_WANTED[mixed]}, so there is nothing to gate")
    return found


def left_out(rows: Sequence[LabelRow], kept: Sequence[LabelRow], mixed: Mixed) -> list[str]:
    """What to say of the other rows."""
    gone = len(rows) - len(kept)
    return [f"{gone} rows without {_WANTED[mixed]} are left out"] if gone else []


def replay(cascade: Cascade, row: LabelRow) -> Verdict | None:
    """Where the cascade ends; None where it needs a probe that the row has not."""
    step: Walk | Verdict = begin(cascade, row.features["static"])
    while isinstance(step, Walk):
        probe = step.pending[0]
        if probe not in row.features:
            return None
        step = observe(cascade, step, row.features[probe], row.tokens[probe])
    return step


def reached(cascade: Cascade, row: LabelRow) -> float:
    """The largest threshold of GRID at which the row is suppressed, -1 for none. What is suppressed only grows as tau falls."""
    low, high = 0, len(GRID)  # the first index that suppresses lies in low..high
    while low < high:
        middle = (low + high) // 2
        verdict = replay(cascade.at(GRID[middle]), row)
        low, high = (low, middle) if verdict is not None and verdict.suppress else (middle + 1, high)
    return GRID[low] if low < len(GRID) else -1.0


def replay_all(cascade: Cascade, rows: Sequence[LabelRow]) -> list[Verdict | None]:
    """As the policy decides; with a threshold of NEVER nothing is asked and nothing is suppressed."""
    if cascade.tau == NEVER:
        return [None] * len(rows)
    return [replay(cascade, row) for row in rows]
