"""Intervals and tests for proportions, exact where that is possible.

The binomial tail is the regularised incomplete beta function I_x(a, b), here by its continued fraction (modified Lentz;
Numerical Recipes 6.4) in logarithms; its inverse by bisection, so that 1e-12 is reached for every a and b.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Interval = tuple[float, float]
_TINY = 1e-300
_EPS = 1e-15


def beta_cdf(x: float, a: float, b: float) -> float:
    """I_x(a, b) for a, b > 0."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    if x < (a + 1) / (a + b + 2):
        return min(front * _fraction(x, a, b) / a, 1.0)
    return max(1 - front * _fraction(1 - x, b, a) / b, 0.0)


def beta_inv(p: float, a: float, b: float) -> float:
    """The x at which I_x(a, b) = p."""
    low, high = 0.0, 1.0
    while high - low > 1e-13:
        middle = (low + high) / 2
        low, high = (middle, high) if beta_cdf(middle, a, b) < p else (low, middle)
    return (low + high) / 2


@lru_cache(maxsize=4096)  # a walk of thresholds asks for the same few counts again and again
def upper_bound(events: int, n: int, delta: float) -> float:
    """Clopper-Pearson: the true rate is above this with probability at most `delta`. 1 where nothing was seen."""
    if not 0 <= events <= n:
        raise ValueError(f"{events} events of {n}")
    return 1.0 if events == n else beta_inv(1 - delta, events + 1, n - events)


def fewest_rows(epsilon: float, delta: float) -> int:
    """How many rows without an event it takes for the upper bound to reach `epsilon`."""
    return math.ceil(math.log(delta) / math.log1p(-epsilon))


def wilson(share: float, n: float, confidence: float = 0.95) -> Interval:
    """Of a share among n rows; n may be an effective number (weighted rows). (0, 1) where n is 0."""
    if n <= 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of the discordant pairs of two paired proportions."""
    n, few = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    tail = 1 - beta_cdf(0.5, few + 1, n - few) if few < n else 1.0  # P(X <= few), X binomial(n, 1/2)
    return min(2 * tail, 1.0)


def bootstrap_mean(
    values: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the weighted mean of paired differences, rows drawn with replacement."""
    random = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        rows = random.integers(0, len(values), len(values))
        means[draw] = np.average(values[rows], weights=weights[rows])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _fraction(x: float, a: float, b: float) -> float:
    c, d = 1.0, 1 / _away(1 - (a + b) * x / (a + 1))
    total = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d, c = 1 / _away(1 + step * d), _away(1 + step / c)
            total *= d * c
        if abs(d * c - 1) < _EPS:
            return total
    raise ArithmeticError(f"the incomplete beta function does not converge at {x}, {a}, {b}")


def _away(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
