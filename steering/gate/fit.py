"""Label rows to a policy: three disjoint splits, for the logistic models, their calibration, and the threshold.

Each stage's model sees the features of all stages up to its own. It is calibrated on the rows of the second split that reach
it, because these are the requests that it will score; a stage that few reach is left out. The threshold is chosen on the third
split, on the decisions of the whole cascade. Rows of live logs are weighted by 1 / propensity; for the threshold they are
thinned instead, each kept with probability smallest propensity / its own, since the exact bound holds for unweighted
draws only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from glob import escape

import numpy as np

from steering.errors import FitError, LabelError
from steering.gate.bounds import fewest_rows
from steering.gate.cascade import NEVER, Cascade, score_of
from steering.gate.effects import Effects, Quality, effects, quality
from steering.gate.features import GATEABLE, GateableKind, Kind
from steering.gate.labels import LabelRow, Labels, same_model, same_settings
from steering.gate.policy import (
    Binding,
    Evaluation,
    Mixed,
    Placement,
    Policy,
    Probes,
    ProbeSettings,
    Stage,
    SuppressMode,
    Thresholds,
    ToolRule,
)
from steering.gate.replay import Columns, acted_on, left_out, reached, replay_all
from steering.gate.signals import StageName
from steering.gate.stages import BY_COST, LEAST, Plan, Splits, fit_stages, staying, values_of
from steering.gate.threshold import Point, choose, curve

_FEW = 30  # rows of a class in a split, below which a warning is given


@dataclass(frozen=True)
class FitSettings:
    """`r`: known from this share of right samples on. `shares`: of fit, calibration and threshold rows.

    `stages` None: all that every row has the features of. `max_probe_tokens` None: enough for every probe.
    """

    r: float = 0.75
    epsilon: float = 0.02
    delta: float = 0.1
    seed: int = 0
    shares: tuple[float, float, float] = (0.4, 0.25, 0.35)
    l2: float = 1.0
    band: tuple[float, float] = (0.1, 0.9)
    stages: tuple[StageName, ...] | None = None
    max_probe_tokens: int | None = None
    timeout_ms: int = 2000
    suppress_mode: SuppressMode = "drop_tools"
    mixed: Mixed = "narrow"
    placement: Placement = "pre"
    explore: float = 0.0
    hidden_profile: str | None = None
    require: float | None = None
    budget_quantile: float | None = None


@dataclass(frozen=True)
class Identity:
    """What the labels' model is where the rows do not say so."""

    base_fingerprint: str | None = None
    delta_digest: str | None = None
    template_sha256: str | None = None


@dataclass(frozen=True)
class Fitted:
    """`quality` by stage, on the rows of the third split that reach it; `rows` of the three splits."""

    policy: Policy
    quality: dict[str, Quality | None]
    effects: Effects
    point: Point | None
    rows: tuple[int, int, int]
    warnings: tuple[str, ...]


def parted(labels: Labels, settings: FitSettings) -> tuple[list[LabelRow], Splits]:
    """The rows that a fit is made of, and its splits of them. Raises FitError."""
    rows = acted_on(labels.rows, settings.mixed)
    return rows, Splits.of(rows, settings.shares, settings.seed)


def fit(labels: Labels, settings: FitSettings, identity: Identity | None = None) -> Fitted:
    """Raises FitError, LabelError."""
    rows, splits = parted(labels, settings)
    asked = same_settings(rows) or ProbeSettings()
    wanted = Plan.of(rows, settings.stages)
    stages = fit_stages(splits, wanted, settings.r, settings.l2, settings.band)
    plan = wanted.ending_at(stages[-1].name)
    most = settings.max_probe_tokens
    most = sum(map(asked.most_tokens, plan.order)) if most is None else most
    cascade = Cascade(tuple(stages), plan.order, asked, most, NEVER)
    judged = _thinned(splits.judge, settings.seed)
    tops = np.array([reached(cascade, row) for row in judged])
    point = choose(curve(tops, Columns.of(judged, settings.r).harmful, settings.delta), settings.epsilon)
    if point is not None:
        cascade = _widened(cascade, point.tau, settings.require)
    found = effects(Columns.of(splits.judge, settings.r), replay_all(cascade, splits.judge), settings.delta)
    policy = Policy(
        model=binding(rows, identity or Identity()),
        tool_kinds=_tool_rules(labels.rows),
        budgets=_budgets(rows, settings.budget_quantile),
        stages=cascade.stages,
        thresholds=Thresholds(suppress=point.tau if point else None, require=settings.require),
        probes=Probes(
            **asked.model_dump(),
            order=plan.order,
            max_probe_tokens=most,
            timeout_ms=settings.timeout_ms,
            hidden_profile=settings.hidden_profile,
        ),
        suppress_mode=settings.suppress_mode,
        mixed=settings.mixed,
        placement=settings.placement,
        explore=settings.explore,
        eval=_evaluation(found, point, settings),
        data_sha256=labels.sha256,
    )
    measured = _qualities(cascade.stages, splits.judge, settings.r)
    complaints = _complaints(labels, rows, wanted, splits, settings)
    complaints += [
        f"the stage {name} is left out: fewer than {LEAST} known or {LEAST} unknown calibration rows reach it"
        for name in wanted.names[len(stages) :]
    ]
    complaints += _verdict(point, len(judged), splits, settings)
    counts = (len(splits.fit), len(splits.calibrate), len(splits.judge))
    return Fitted(policy, measured, found, point, counts, tuple(complaints))


def _widened(cascade: Cascade, tau: float, require: float | None) -> Cascade:
    """With its threshold, which no band of a policy leaves out."""
    if require is not None and require >= tau:
        raise FitError(f"require {require:g} is not below the threshold {tau:g} that was found")
    stages = [one.model_copy(update={"lo": min(one.lo, tau), "hi": max(one.hi, tau)}) for one in cascade.stages]
    return replace(cascade.at(tau), stages=tuple(stages))


def _thinned(rows: list[LabelRow], seed: int) -> list[LabelRow]:
    least = min(row.propensity for row in rows)
    draw = random.Random(seed)
    return [row for row in rows if draw.random() < least / row.propensity]


def _qualities(stages: Sequence[Stage], rows: list[LabelRow], r: float) -> dict[str, Quality | None]:
    found: dict[str, Quality | None] = {}
    for stage in stages:
        columns = Columns.of(rows, r)
        found[stage.name] = quality(np.array([score_of(stage, values_of(row)) for row in rows]), columns.y, columns.w)
        rows = staying(stage, rows)
    return found


def binding(rows: Sequence[LabelRow], identity: Identity) -> Binding:
    """Of what the policy is. Raises LabelError where neither rows nor `identity` say it."""
    said = same_model(rows)
    base = identity.base_fingerprint or said.base_fingerprint
    template = said.template_sha256 if identity.template_sha256 is None else identity.template_sha256
    if base is None or template is None:
        raise LabelError("the rows do not say which base and chat template answered; name both")
    return Binding(
        name=said.name,
        base_fingerprint=base,
        delta_digest=identity.delta_digest or said.delta_digest,
        template_sha256=template,
    )


def _tool_rules(rows: Sequence[LabelRow]) -> tuple[ToolRule, ...]:
    """Every tool of the rows by its exact name."""
    kinds: dict[str, Kind] = {}
    for row in rows:
        for name, kind in row.kinds.items():
            if kinds.setdefault(name, kind) != kind:
                raise LabelError(f"the tool {name!r} is {kinds[name]} in one row and {kind} in another")
    return tuple(ToolRule(match=escape(name), kind=kind) for name, kind in sorted(kinds.items()))


def _budgets(rows: Sequence[LabelRow], quantile: float | None) -> dict[GateableKind, int]:
    """Per kind, of the questions whose gateable tools are all of it: a quantile of the fewest calls that were needed."""
    if quantile is None:
        return {}
    found: dict[GateableKind, int] = {}
    for kind in GATEABLE:
        needed = [row.n for row in rows if row.n and {one for one in row.kinds.values() if one in GATEABLE} == {kind}]
        if len(needed) >= _FEW:
            found[kind] = int(np.quantile(needed, quantile, method="higher"))
    return found


def _evaluation(found: Effects, point: Point | None, settings: FitSettings) -> Evaluation:
    return Evaluation(
        n=found.n,
        alpha=found.alpha.value,
        beta=found.before.beta.value if found.before.beta else None,
        overuse_before=found.before.overuse.value,
        overuse_after=found.after.overuse.value,
        accuracy_before=found.before.accuracy.value,
        accuracy_after=found.after.accuracy.value,
        harm=found.harm.value,
        harm_ucb=point.harm_ucb if point else None,
        epsilon=settings.epsilon,
        delta=settings.delta,
    )


def _complaints(
    labels: Labels, rows: Sequence[LabelRow], plan: Plan, splits: Splits, settings: FitSettings
) -> list[str]:
    found = left_out(labels.rows, rows, settings.mixed)
    for probe in BY_COST if settings.stages is None else ():
        holding = sum(probe in row.features for row in rows)
        if holding and probe not in plan.order:
            found.append(f"the stage {probe} is left out: {holding} of {len(rows)} rows have its features")
    if "hidden" in plan.order and settings.hidden_profile is None:
        found.append("no profile is named whose probe the stage hidden reads (--streams or --hidden-profile)")
    for part, use in (
        (splits.fit, "fit"),
        (splits.calibrate, "calibrate"),
        (splits.judge, "choose the threshold"),
    ):
        known = sum(row.p_known >= settings.r for row in part)
        if min(known, len(part) - known) < _FEW:
            found.append(f"few rows to {use}: {known} known and {len(part) - known} unknown ones")
    return found


def _verdict(point: Point | None, judged: int, splits: Splits, settings: FitSettings) -> list[str]:
    found = []
    if judged < len(splits.judge):
        found.append(f"{judged} of {len(splits.judge)} rows choose the threshold, so that all count alike")
    if point is None:
        found.append(
            f"no threshold keeps the bound of the harm within {settings.epsilon:g}, so the gate never suppresses; "
            f"{judged} rows are there, and {fewest_rows(settings.epsilon, settings.delta)} are needed where none is harmed"
        )
    return found
