"""Two pictures of a policy on labelled questions: whether its scores are true, and what its threshold trades."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steering.errors import SteeringError
from steering.gate.bounds import wilson
from steering.gate.measures import Array, bins_of
from steering.gate.threshold import Point


def reliability(s: Array, y: Array, w: Array, path: Path) -> None:
    """Share of known questions over the score, in ten bins of equal mass with Wilson intervals."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(5, 5), layout="constrained")
    found = bins_of(s, y, w)
    ends = [wilson(one.share, one.n) for one in found]
    shares = [one.share for one in found]
    below = [max(one.share - low, 0.0) for one, (low, _) in zip(found, ends, strict=True)]
    above = [max(high - one.share, 0.0) for one, (_, high) in zip(found, ends, strict=True)]
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    axes.errorbar([one.score for one in found], shares, yerr=[below, above], fmt="o-", capsize=3)
    axes.set(xlabel="score", ylabel="share known", xlim=(0, 1), ylim=(0, 1), title=f"reliability, {len(s)} questions")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def risk_coverage(points: Sequence[Point], n: int, chosen: float | None, epsilon: float | None, path: Path) -> None:
    """Harm and its bound over the share of requests that are suppressed, one point per threshold."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    coverage = [point.suppressed / n for point in points]
    axes.plot(coverage, [point.harmed / n for point in points], label="harm")
    axes.plot(coverage, [point.harm_ucb for point in points], linestyle="--", label="its upper bound")
    if epsilon is not None:
        axes.axhline(epsilon, color="grey", linewidth=1, label=f"epsilon {epsilon:g}")
    at = next((point for point in points if point.tau == chosen), None)
    if at is not None:
        axes.plot([at.suppressed / n], [at.harmed / n], "o", label=f"threshold {at.tau:.2f}")
    axes.set(
        xlabel="share suppressed", ylabel="harm", xlim=(0, 1), ylim=(0, None), title=f"risk and coverage, {n} questions"
    )
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise SteeringError("pictures need matplotlib: pip install 'deltaworks[train]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
