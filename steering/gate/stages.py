"""The stages of a cascade, fitted to label rows: what is asked, logistic models on one split, their calibration on another."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steering.errors import FitError
from steering.gate.cascade import raw_score, score_of
from steering.gate.labels import LabelRow
from steering.gate.models import centred, fit_isotonic, fit_logistic
from steering.gate.policy import Feature, Isotonic, Stage
from steering.gate.replay import Columns
from steering.gate.signals import FEATURES, SCALES, Probe, StageName, scaled

BY_COST: tuple[Probe, ...] = ("peek", "hidden", "draft", "ptrue", "samples")
LEAST = 10  # rows of each class that reach a stage after the first, so that it can be calibrated


@dataclass(frozen=True)
class Splits:
    """Disjoint rows: to fit models on, to calibrate them, to choose the threshold."""

    fit: list[LabelRow]
    calibrate: list[LabelRow]
    judge: list[LabelRow]

    @classmethod
    def of(cls, rows: Sequence[LabelRow], shares: tuple[float, float, float], seed: int) -> Splits:
        """By id, so that it does not hang on the order of the rows. Raises FitError."""
        if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
            raise FitError("the three splits need shares above 0 that sum to 1")
        ordered = sorted(rows, key=lambda row: row.id)
        random.Random(seed).shuffle(ordered)
        first, second = round(shares[0] * len(rows)), round((shares[0] + shares[1]) * len(rows))
        parts = ordered[:first], ordered[first:second], ordered[second:]
        if not all(parts):
            raise FitError(f"{len(rows)} rows are too few for three splits")
        return cls(*parts)


@dataclass(frozen=True)
class Plan:
    """`order`: of the probes; `names`: of the stages that are scored on the way."""

    order: tuple[Probe, ...]
    names: tuple[StageName, ...]

    @classmethod
    def of(cls, rows: Sequence[LabelRow], wanted: Sequence[StageName] | None) -> Plan:
        """None: all stages that every row has the features of, the cheapest first. Raises FitError."""
        if wanted is None:
            everywhere = [probe for probe in BY_COST if all(probe in row.features for row in rows)]
            order = [probe for probe in everywhere if probe != "ptrue" or "draft" in everywhere]
            return cls(tuple(order), ("static", *order))
        order = []
        for name in wanted:
            order += ["draft"] if name == "ptrue" else []  # it asks about the draft
            order += [] if name == "static" else [name]
        order = list(dict.fromkeys(order))
        for probe in order:
            lacking = next((row.id for row in rows if probe not in row.features), None)
            if lacking is not None:
                raise FitError(f"row {lacking!r} has no features of the stage {probe}")
        places: tuple[StageName, ...] = ("static", *order)
        return cls(tuple(order), tuple(place for place in places if place in wanted))

    def ending_at(self, name: StageName) -> Plan:
        """Without the stages after one, and without the probes that only they need."""
        order = () if name == "static" else self.order[: self.order.index(name) + 1]
        return Plan(order, self.names[: self.names.index(name) + 1])

    def features(self, name: StageName) -> list[str]:
        """What is known when a stage is scored."""
        places = ("static",) if name == "static" else ("static", *self.order[: self.order.index(name) + 1])
        return [feature for place in places for feature in FEATURES[place]]


def fit_stages(splits: Splits, plan: Plan, r: float, l2: float, band: tuple[float, float]) -> list[Stage]:
    """A row is known where `p_known` >= `r`. `band`: a score below or above it decides. Raises FitError.

    The list ends before a stage that too few calibration rows reach: all others were decided without it.
    """
    stages: list[Stage] = []
    arriving = splits.calibrate
    for name in plan.names:
        known = sum(row.p_known >= r for row in arriving)
        if stages and min(known, len(arriving) - known) < LEAST:
            break
        stage = _uncalibrated(name, plan.features(name), splits.fit, r, l2, band)
        columns = Columns.of(arriving, r)
        raw = np.array([raw_score(stage, values_of(row)) for row in arriving])
        stages.append(
            stage.model_copy(update={"isotonic": centred(fit_isotonic(raw, columns.y, columns.w), raw, columns.w)})
        )
        arriving = staying(stages[-1], arriving)
    return stages


def staying(stage: Stage, rows: Sequence[LabelRow]) -> list[LabelRow]:
    """The rows whose score lies inside the stage's band, so that they go on to the next one."""
    return [row for row in rows if stage.lo <= score_of(stage, values_of(row)) <= stage.hi]


def values_of(row: LabelRow) -> dict[str, float]:
    """All features of a row by name."""
    return {name: value for stage in row.features.values() for name, value in stage.items()}


def _uncalibrated(
    name: StageName, features: list[str], rows: list[LabelRow], r: float, l2: float, band: tuple[float, float]
) -> Stage:
    """Features that are the same in all rows are left out."""
    columns = Columns.of(rows, r)
    scales = [SCALES.get(feature, "linear") for feature in features]
    x = np.array(
        [
            [scaled(values[feature], scale) for feature, scale in zip(features, scales, strict=True)]
            for values in map(values_of, rows)
        ]
    )
    mean = np.average(x, axis=0, weights=columns.w)
    std = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=columns.w))
    varying = np.flatnonzero(std > 1e-9)
    if not len(varying):
        raise FitError(f"stage {name}: no feature differs between the {len(rows)} rows to fit on")
    try:
        model = fit_logistic((x[:, varying] - mean[varying]) / std[varying], columns.y, columns.w, l2)
    except FitError as error:
        raise FitError(f"stage {name}, {len(rows)} rows to fit on: {error}") from error
    chosen = tuple(Feature(name=features[i], mean=float(mean[i]), std=float(std[i]), scale=scales[i]) for i in varying)
    identity = Isotonic(x=(0.0, 1.0), y=(0.0, 1.0))
    return Stage(name=name, features=chosen, logistic=model, isotonic=identity, lo=band[0], hi=band[1])
