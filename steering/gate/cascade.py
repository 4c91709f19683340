"""The cascade of calibrated scores, without I/O: which probes to run next, and when a score decides.

    probes of the next stage ─▶ score s ─▶ s > hi: stop   s < lo: stop   else the next stage ─▶ at the end s >= tau

Every stage's score is a calibrated probability of the same event, right without tools, so one threshold tau serves all of
them, and lo <= tau <= hi at every stage: a score that stops the cascade early lies on the side of tau that it decides
for. The cascade ends as well where the next stage's probes could take more tokens than are left.

Serving, fitting and evaluating all walk through `begin` and `observe`, so the harm that a threshold was chosen by is that of
the very rule that is served. For a fixed cascade the set of suppressed requests only grows as tau falls.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from steering.gate.policy import Policy, ProbeSettings, Stage
from steering.gate.signals import Probe, scaled

NEVER = math.inf


@dataclass(frozen=True)
class Cascade:
    """`order`: of probes. `tau` NEVER: no score reaches it. Bands widen where tau lies outside them."""

    stages: tuple[Stage, ...]
    order: tuple[Probe, ...]
    settings: ProbeSettings
    max_probe_tokens: int
    tau: float

    @classmethod
    def of(cls, policy: Policy) -> Cascade:
        tau = policy.thresholds.suppress
        probes = policy.probes
        return cls(policy.stages, probes.order, probes, probes.max_probe_tokens, NEVER if tau is None else tau)

    def at(self, tau: float) -> Cascade:
        return replace(self, tau=tau)

    def segment(self, index: int) -> tuple[Probe, ...]:
        """The probes to run between the stage before this one and this one."""
        start = self._place(index - 1) if index else 0
        return self.order[start : self._place(index)]

    def _place(self, index: int) -> int:
        """How many probes of the order are done when a stage is scored."""
        name = self.stages[index].name
        return 0 if name == "static" else self.order.index(name) + 1


@dataclass(frozen=True)
class Walk:
    """A cascade under way: the probes still to run, first one first, before stage number `index` is scored."""

    features: Mapping[str, float]
    pending: tuple[Probe, ...] = ()
    index: int = 0
    tokens: int = 0
    score: float | None = None
    stage: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Where a cascade ended. `score` and `stage` are None where not even the first stage could be reached.

    `side`: the score was above or below its stage's band, or inside it when nothing was left to ask.
    """

    features: Mapping[str, float]
    tokens: int
    score: float | None
    stage: str | None
    side: Literal["above", "below", "inside"]
    suppress: bool


def begin(cascade: Cascade, static: Mapping[str, float]) -> Walk | Verdict:
    return _enter(cascade, Walk(static))


def observe(cascade: Cascade, walk: Walk, features: Mapping[str, float], tokens: int) -> Walk | Verdict:
    """Take in the features of the first pending probe and the completion tokens that it took."""
    known = replace(walk, features={**walk.features, **features}, pending=walk.pending[1:], tokens=walk.tokens + tokens)
    return known if known.pending else _score(cascade, known)


def score_of(stage: Stage, features: Mapping[str, float]) -> float:
    """P(right without tools). Raises KeyError for a feature that is missing."""
    return calibrated(stage.isotonic.x, stage.isotonic.y, raw_score(stage, features))


def raw_score(stage: Stage, features: Mapping[str, float]) -> float:
    """Of the logistic model, before calibration."""
    z = stage.logistic.bias
    for feature, weight in zip(stage.features, stage.logistic.weights, strict=True):
        z += weight * (scaled(features[feature.name], feature.scale) - feature.mean) / feature.std
    return 0.0 if math.isnan(z) else sigmoid(z)  # infinities of both signs: nothing is known, so tools stay


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def calibrated(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """Linear between the points, constant outside."""
    right = bisect_right(x, at)
    if right in (0, len(x)):
        return y[0] if right == 0 else y[-1]
    share = (at - x[right - 1]) / (x[right] - x[right - 1])
    return y[right - 1] + share * (y[right] - y[right - 1])


def _enter(cascade: Cascade, walk: Walk) -> Walk | Verdict:
    """Go towards stage `walk.index`, if there is one and its probes can be paid for."""
    if walk.index == len(cascade.stages):
        return _end(cascade, walk)
    probes = cascade.segment(walk.index)
    most = sum(map(cascade.settings.most_tokens, probes))
    if walk.tokens + most > cascade.max_probe_tokens:
        return _end(cascade, walk)
    return replace(walk, pending=probes) if probes else _score(cascade, walk)


def _score(cascade: Cascade, walk: Walk) -> Walk | Verdict:
    stage = cascade.stages[walk.index]
    score = score_of(stage, walk.features)
    scored = replace(walk, score=score, stage=stage.name, index=walk.index + 1)
    if score > max(stage.hi, cascade.tau):
        return Verdict(scored.features, scored.tokens, score, stage.name, "above", True)
    if score < min(stage.lo, cascade.tau):
        return Verdict(scored.features, scored.tokens, score, stage.name, "below", False)
    return _enter(cascade, scored)


def _end(cascade: Cascade, walk: Walk) -> Verdict:
    reached = walk.score is not None and walk.score >= cascade.tau
    return Verdict(walk.features, walk.tokens, walk.score, walk.stage, "inside", reached)
