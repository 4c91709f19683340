"""The models of a stage: logistic regression and isotonic calibration, both without a random number.

x [N, F] standardised features, y [N] 0 or 1, w [N] weights above 0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from steering.errors import FitError
from steering.gate.policy import Isotonic, Logistic

Array = npt.NDArray[np.float64]


def fit_logistic(x: Array, y: Array, w: Array, l2: float = 1.0) -> Logistic:
    """Minimises sum_i w_i log(1 + exp(-y_i z_i)) + l2/2 |weights|^2 (y as -1, 1; the bias is free) by Newton's method.

    Steps are halved while the loss rises, which with l2 > 0 and both classes present always ends at the one minimum.
    Raises FitError where a class is missing.
    """
    if l2 <= 0:
        raise FitError("l2 must be above 0: separable rows have no finite fit without it")
    if not 0 < y.sum() < len(y):
        raise FitError("all rows are of one class; the other one is needed as well")
    x1 = np.column_stack([x, np.ones(len(x))])
    ridge = np.append(np.full(x.shape[1], l2), 0.0)
    theta = np.zeros(x1.shape[1])
    loss = _loss(theta, x1, y, w, ridge)
    for _ in range(100):
        p = _sigmoid(x1 @ theta)
        gradient = x1.T @ (w * (p - y)) + ridge * theta
        hessian = (x1 * (w * p * (1 - p))[:, None]).T @ x1 + np.diag(ridge + 1e-12)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while _loss(theta - size * step, x1, y, w, ridge) > loss and size > 1e-10:
            size /= 2
        theta = theta - size * step
        loss = min(loss, _loss(theta, x1, y, w, ridge))
        if np.abs(size * step).max() < 1e-10:
            break
    return Logistic(weights=tuple(map(float, theta[:-1])), bias=float(theta[-1]))


def fit_isotonic(p: Array, y: Array, w: Array) -> Isotonic:
    """The non-decreasing step function closest to y (pool adjacent violators), as points at the ends of its steps."""
    x, place = np.unique(p, return_inverse=True)
    mass = np.bincount(place, w, len(x))
    mean = np.bincount(place, w * y, len(x)) / mass
    blocks: list[tuple[float, float, int]] = []  # mean, weight, points
    for value, weight in zip(mean, mass, strict=True):
        block = (float(value), float(weight), 1)
        while blocks and blocks[-1][0] >= block[0]:
            before = blocks.pop()
            total = before[1] + block[1]
            block = ((before[0] * before[1] + block[0] * block[1]) / total, total, before[2] + block[2])
        blocks.append(block)
    points: list[tuple[float, float]] = []
    first = 0
    for value, _, length in blocks:
        level = min(max(value, 0.0), 1.0)
        ends = {float(x[first]), float(x[first + length - 1])}
        points += [(end, level) for end in sorted(ends)]
        first += length
    return Isotonic(x=tuple(end for end, _ in points), y=tuple(level for _, level in points))


def centred(fitted: Isotonic, p: Array, w: Array) -> Isotonic:
    """The step function made to rise everywhere, so that a threshold can fall inside a step (centred isotonic regression,
    Oron and Flournoy 2017).

    A step stands at the mean of its rows' p, its level shrunk by half a row of each class (else the last step of a good model is 1,
    and all of its rows are one); straight lines join the steps, from (0, 0) to (1, 1). p [N], w [N]: the rows of the fit.
    """
    level = np.interp(p, fitted.x, fitted.y)
    x, y = [0.0], [0.0]
    for one in np.unique(level):
        inside = level == one
        mass = float(w[inside].sum())
        at = float(np.average(p[inside], weights=w[inside]))
        if x[-1] < at < 1:
            x.append(at)
            y.append(max(y[-1], (float(one) * mass + 0.5) / (mass + 1)))
    return Isotonic(x=(*x, 1.0), y=(*y, 1.0))


def _loss(theta: Array, x1: Array, y: Array, w: Array, ridge: Array) -> float:
    z = x1 @ theta
    return float((w * (np.logaddexp(0, z) - y * z)).sum() + (ridge * theta * theta).sum() / 2)


def _sigmoid(z: Array) -> Array:
    p: Array = np.exp(-np.logaddexp(0, -z))
    return p
