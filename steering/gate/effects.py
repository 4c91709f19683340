"""What a gate does to a set of labelled questions: calls, overuse, underuse, accuracy, harm, before and after.

alpha is the share of known questions (right without tools), beta the share of these on which tools are called nevertheless,
overuse O = alpha * beta the share of all questions with a needless call (SMART, arXiv 2502.11435). All rates are weighted by 1 /
propensity; intervals are Wilson's at 95 %, on Kish's effective number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steering.gate.bounds import Interval, bootstrap_mean, mcnemar, upper_bound, wilson
from steering.gate.cascade import Verdict
from steering.gate.measures import Array, auroc, brier, ece, effective
from steering.gate.replay import Columns

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Rate:
    value: float
    interval: Interval


@dataclass(frozen=True)
class Outcome:
    """`underuse`: unknown questions without a call. `tool_harm`, `tool_rescue`: what tools spoil and what they save, of all."""

    call_rate: Rate
    calls: float
    beta: Rate | None
    overuse: Rate
    underuse: Rate | None
    accuracy: Rate
    tool_harm: Rate
    tool_rescue: Rate


@dataclass(frozen=True)
class Quality:
    """Of scores, against known or not. ECE in bins of equal mass and of equal width."""

    n: int
    auroc: float | None
    ece_mass: float
    ece_width: float
    brier: float


@dataclass(frozen=True)
class Effects:
    """`harm`: suppressed, wrong without and right with tools (tool rescue lost); `spared`: the other way round.

    `harm_ucb`: Clopper-Pearson bound, None for weighted rows. `precision`: right without tools among the suppressed.
    `accuracy_change` by paired bootstrap, `mcnemar_p` exact and unweighted. `unasked`: rows that lack a signal which the policy
    asks for; they are left as they are.
    """

    n: int
    alpha: Rate
    before: Outcome
    after: Outcome
    suppressed: Rate
    precision: Rate | None
    harm: Rate
    harm_ucb: float | None
    spared: Rate
    accuracy_change: Rate
    mcnemar_p: float
    probe_tokens: float
    unasked: int
    score: Quality | None


def effects(columns: Columns, verdicts: Sequence[Verdict | None], delta: float, unasked: int = 0) -> Effects:
    """`verdicts`: None where the row is left as it is."""
    c = columns
    cut = np.array([verdict is not None and verdict.suppress for verdict in verdicts], dtype=bool)
    everyone = np.ones(len(cut), dtype=bool)
    after = np.where(cut, c.without, c.with_tools)
    change = after.astype(float) - c.with_tools
    harmed, spared = cut & c.harmful, cut & c.without & ~c.with_tools
    even = bool((c.w == c.w[0]).all())
    return Effects(
        n=len(cut),
        alpha=_rate(c.y > 0, everyone, c.w),
        before=_outcome(c, ~everyone),
        after=_outcome(c, cut),
        suppressed=_rate(cut, everyone, c.w),
        precision=_rate(c.without, cut, c.w) if cut.any() else None,
        harm=_rate(harmed, everyone, c.w),
        harm_ucb=upper_bound(int(harmed.sum()), len(cut), delta) if even else None,
        spared=_rate(spared, everyone, c.w),
        accuracy_change=Rate(float(np.average(change, weights=c.w)), bootstrap_mean(change, c.w)),
        mcnemar_p=mcnemar(int(harmed.sum()), int(spared.sum())),
        probe_tokens=float(np.average([one.tokens if one else 0 for one in verdicts], weights=c.w)),
        unasked=unasked,
        score=quality(*scored(c, verdicts)),
    )


def scored(columns: Columns, verdicts: Sequence[Verdict | None]) -> tuple[Array, Array, Array]:
    """Scores, y and weights of the rows at whose end a score stands."""
    found = [(i, one.score) for i, one in enumerate(verdicts) if one is not None and one.score is not None]
    rows = [i for i, _ in found]
    return np.array([score for _, score in found]), columns.y[rows], columns.w[rows]


def quality(s: Array, y: Array, w: Array) -> Quality | None:
    """None without a row."""
    if not len(s):
        return None
    return Quality(len(s), auroc(s, y, w), ece(s, y, w, "mass"), ece(s, y, w, "width"), brier(s, y, w))


def _outcome(c: Columns, cut: Mask) -> Outcome:
    everyone = np.ones(len(cut), dtype=bool)
    known = c.y > 0
    called = c.called & ~cut
    accurate = np.where(cut, c.without, c.with_tools)
    return Outcome(
        call_rate=_rate(called, everyone, c.w),
        calls=float(np.average(np.where(cut, 0.0, c.calls), weights=c.w)),
        beta=_rate(called, known, c.w) if known.any() else None,
        overuse=_rate(called & known, everyone, c.w),
        underuse=_rate(~called, ~known, c.w) if (~known).any() else None,
        accuracy=_rate(accurate, everyone, c.w),
        tool_harm=_rate(c.without & ~accurate, everyone, c.w),
        tool_rescue=_rate(~c.without & accurate, everyone, c.w),
    )


def _rate(event: Mask, among: Mask, w: Array) -> Rate:
    share = float(np.average(event[among], weights=w[among]))
    return Rate(share, wilson(share, effective(w[among])))
