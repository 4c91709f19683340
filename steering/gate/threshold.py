"""The threshold of a gate, chosen with a bound on the harm that it does.

Harm is P(suppressed, and wrong without tools, and right with them) over all requests that the gate may act on. Thresholds are
tried on a fixed grid from 1 downward; at each the Clopper-Pearson bound U of the harm is taken at level delta, and the walk
stops before the first U > epsilon. Fixed-sequence testing: the first true hypothesis `harm > epsilon` on the way is the only one
that can be wrongly passed, so no correction for many tests is needed and P(harm of the chosen tau > epsilon) <= delta
(Learn then Test, arXiv 2110.01052, 3.3). It is a statement about the draw of the rows, which must be independent, drawn as live
requests are, and not used for fitting.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steering.gate.bounds import upper_bound

# Finer where good models put most of their scores.
GRID: tuple[float, ...] = (*(step / 1000 for step in range(1000, 900, -1)), *(step / 100 for step in range(90, -1, -1)))


@dataclass(frozen=True)
class Point:
    """A threshold, how many rows it suppresses, how many of these are harmed, and the bound of the harm."""

    tau: float
    suppressed: int
    harmed: int
    harm_ucb: float


def curve(reached: npt.NDArray[np.float64], harmful: npt.NDArray[np.bool_], delta: float) -> list[Point]:
    """One point per threshold of GRID, from 1 downward.

    `reached` [N]: the largest threshold at which a row is suppressed, below 0 for never; `harmful` [N]: suppressing it harms.
    """
    points = []
    for tau in GRID:
        suppressed = reached >= tau
        harmed = int((suppressed & harmful).sum())
        points.append(Point(tau, int(suppressed.sum()), harmed, upper_bound(harmed, len(reached), delta)))
    return points


def choose(points: list[Point], epsilon: float) -> Point | None:
    """The last point before the bound first exceeds `epsilon`; None where it does at once."""
    chosen = None
    for point in points:
        if point.harm_ucb > epsilon:
            break
        chosen = point
    return chosen
