"""How good calibrated scores are: AUROC, Brier score, expected calibration error. Rows may be weighted.

s [N] scores in 0..1, y [N] 0 or 1, w [N] weights above 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Bins = Literal["mass", "width"]


@dataclass(frozen=True)
class Bin:
    """Rows of about the same score: their mean score, their share of y = 1, how many they are (effectively)."""

    score: float
    share: float
    n: float
    weight: float


def auroc(s: Array, y: Array, w: Array) -> float | None:
    """Probability that a row of y = 1 scores above one of y = 0, ties half. None with one class only."""
    values, place = np.unique(s, return_inverse=True)
    ones = np.bincount(place, w * y, len(values))
    zeros = np.bincount(place, w * (1 - y), len(values))
    pairs = ones.sum() * zeros.sum()
    if pairs <= 0:
        return None
    below = np.cumsum(zeros) - zeros
    return float((ones * (below + zeros / 2)).sum() / pairs)


def brier(s: Array, y: Array, w: Array) -> float:
    return float(np.average((s - y) ** 2, weights=w))


def ece(s: Array, y: Array, w: Array, bins: Bins = "mass", count: int = 10) -> float:
    """Mean distance between score and share over bins, weighted by their rows. See `bins_of`."""
    found = bins_of(s, y, w, bins, count)
    return sum(one.weight * abs(one.score - one.share) for one in found)


def bins_of(s: Array, y: Array, w: Array, bins: Bins = "mass", count: int = 10) -> list[Bin]:
    """`mass`: bins of about equal weight, equal scores together. `width`: [0, 1] in equal parts. Empty ones are left out."""
    if bins == "width":
        place = np.minimum((s * count).astype(int), count - 1)
    else:
        values, inverse = np.unique(s, return_inverse=True)
        mass = np.bincount(inverse, w, len(values))
        middle = (np.cumsum(mass) - mass / 2) / mass.sum()
        place = np.minimum((middle * count).astype(int), count - 1)[inverse]
    return [_bin(s[rows], y[rows], w[rows], w.sum()) for one in range(count) if (rows := place == one).any()]


def effective(w: Array) -> float:
    """Kish's number of equally weighted rows that would be as good."""
    return float(w.sum() ** 2 / (w**2).sum()) if len(w) else 0.0


def _bin(s: Array, y: Array, w: Array, total: float) -> Bin:
    return Bin(
        float(np.average(s, weights=w)),
        float(np.average(y, weights=w)),
        effective(w),
        float(w.sum() / total),
    )
