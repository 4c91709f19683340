"""A policy on label rows: its decisions replayed, and what they do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from steering.gate.cascade import NEVER, Cascade, Verdict
from steering.gate.effects import Effects, effects
from steering.gate.labels import LabelRow, Labels, same_model, same_settings
from steering.gate.policy import Policy
from steering.gate.replay import Columns, acted_on, left_out, reached, replay_all
from steering.gate.threshold import Point, curve


@dataclass(frozen=True)
class Judged:
    """`rows` are those that a score may act on; a verdict is None where the row is left as it is."""

    rows: tuple[LabelRow, ...]
    columns: Columns
    verdicts: tuple[Verdict | None, ...]
    effects: Effects
    warnings: tuple[str, ...]


def judge(policy: Policy, labels: Labels, r: float, delta: float) -> Judged:
    """Exploration is left out. Raises FitError, LabelError."""
    rows = acted_on(labels.rows, policy.mixed)
    cascade = Cascade.of(policy)
    verdicts = replay_all(cascade, rows)
    unasked = 0 if cascade.tau == NEVER else sum(one is None for one in verdicts)
    columns = Columns.of(rows, r)
    return Judged(
        rows=tuple(rows),
        columns=columns,
        verdicts=tuple(verdicts),
        effects=effects(columns, verdicts, delta, unasked),
        warnings=tuple(_doubts(policy, labels, rows)),
    )


def harm_curve(policy: Policy, judged: Judged, delta: float) -> list[Point]:
    """The harm at every threshold, with the bands as they are in the policy. Rows count alike, whatever their weights."""
    tops = np.array([reached(Cascade.of(policy), row) for row in judged.rows])
    return curve(tops, judged.columns.harmful, delta)


def _doubts(policy: Policy, labels: Labels, rows: list[LabelRow]) -> list[str]:
    found = []
    if policy.data_sha256 == labels.sha256:
        found.append("these are the rows that the policy was fitted on")
    found += left_out(labels.rows, rows, policy.mixed)
    model, bound = same_model(rows), policy.model
    for what, fitted, answered in (
        ("base", bound.base_fingerprint, model.base_fingerprint),
        ("delta", bound.delta_digest, model.delta_digest),
        ("chat template", bound.template_sha256, model.template_sha256),
    ):
        if answered is not None and answered != fitted:
            found.append(f"the rows are of {what} {answered}, the policy of {fitted or 'none'}")
    asked = same_settings(rows)
    if asked is not None and any(getattr(policy.probes, name) != value for name, value in asked.model_dump().items()):
        found.append(f"the rows were asked with {asked}, the policy asks with {policy.probes}")
    return found
