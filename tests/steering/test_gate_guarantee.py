"""What is replayed is what is served, and the bound on the harm holds over many calibration sets."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.gate.cascade import Cascade
from steering.gate.fit import FitSettings, fit
from steering.gate.labels import LabelRow
from steering.gate.replay import reached, replay
from steering.gate.signals import Draft, Samples
from steering.gate.threshold import GRID, choose, curve
from steering.toolgate import Decision, NeedProbe, advance, start
from tests.steering.gate_world import asking, labels, policy, read_row, rows, stage


@pytest.mark.slow
@given(st.integers(0, 100_000), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_what_is_replayed_is_what_is_served(seed: int, tau: float, lo: float, hi: float, most: int) -> None:
    """The state machine and the replay of a label row end alike, for any band, threshold and token limit."""
    lo, hi = min(lo, hi, tau), max(lo, hi, tau)
    made = policy(
        stages=[stage("static", -2, 4, lo, hi), stage("draft", 3, 3, lo, hi), stage("samples", 3, -1, lo, hi)],
        thresholds={"suppress": tau},
        probes={"order": ["draft", "samples"], "k": 5, "max_tokens": 8, "max_probe_tokens": most},
    )
    for given_row in rows(4, seed, ("draft", "samples")):
        row = read_row(given_row)
        verdict = replay(Cascade.of(made), row)
        assert verdict is not None
        step = start(made, asking(row.question))
        while isinstance(step, NeedProbe):
            step = advance(step, Recorded[step.probe](row), 0.0)
        assert isinstance(step, Decision)
        assert (step.action == "suppress", step.stage, step.completion_tokens) == (
            verdict.suppress,
            verdict.stage,
            verdict.tokens,
        )
        assert step.score == pytest.approx(verdict.score) or step.score == verdict.score
        tops = reached(Cascade.of(made), row)
        for one in GRID:
            found = replay(Cascade.of(made).at(one), row)
            assert found is not None
            assert found.suppress == (one <= tops)


def _draft(row: LabelRow) -> Draft:
    mean = row.features["draft"]["draft.mean_logprob"]
    return Draft("8", (mean,), ((-0.1,),), True)


def _samples(row: LabelRow) -> Samples:
    share = round(5 * row.features["samples"]["samples.top_share"])
    return Samples(("same",) * share + tuple(f"other{i}" for i in range(5 - share)), 0, row.tokens["samples"])


Recorded = {"draft": _draft, "samples": _samples}


@pytest.mark.slow
def test_the_guarantee_holds_over_many_calibration_sets(tmp_path: Path) -> None:
    """Rows drawn from a large population whose harm at every threshold is known."""
    fitted = fit(labels(tmp_path, rows(1500, stages=("draft", "samples", "ptrue"))), FitSettings(epsilon=0.03))
    many = labels(tmp_path, rows(3000, 77, ("draft", "samples", "ptrue")))
    cascade = Cascade.of(fitted.policy)
    tops = np.array([reached(cascade, row) for row in many.rows])
    harmful = np.array([not row.correct_without and row.correct_with for row in many.rows])
    truth = {tau: float(((tops >= tau) & harmful).mean()) for tau in GRID}
    random = np.random.default_rng(5)
    for epsilon, delta in ((0.03, 0.1), (0.02, 0.2)):
        broken, suppressing, draws = 0, 0, 400
        for _ in range(draws):
            drawn = random.integers(0, 3000, 400)
            point = choose(curve(tops[drawn], harmful[drawn], delta), epsilon)
            broken += point is not None and truth[point.tau] > epsilon
            suppressing += point is not None and point.suppressed > 0
        assert broken / draws <= delta + 3 * (delta * (1 - delta) / draws) ** 0.5
        assert suppressing / draws > 0.5  # and it is no gate that does nothing


def test_a_threshold_that_ignores_the_bound_breaks_the_guarantee() -> None:
    """The same simulation with the observed harm in the bound's place: it fails, so the simulation can fail."""
    random = np.random.default_rng(6)
    scores = random.random(20_000)
    harmful = random.random(20_000) < 0.1 * (1 - scores)
    truth = {tau: float(((scores >= tau) & harmful).mean()) for tau in GRID}
    broken = {"bound": 0, "observed": 0}
    for _ in range(300):
        drawn = random.integers(0, 20_000, 400)
        points = curve(scores[drawn], harmful[drawn], 0.1)
        observed = [replace(one, harm_ucb=one.harmed / 400) for one in points]
        for name, walk in (("bound", points), ("observed", observed)):
            point = choose(walk, 0.03)
            broken[name] += point is not None and truth[point.tau] > 0.03
    assert broken["bound"] / 300 <= 0.15
    assert broken["observed"] / 300 > 0.3


def test_the_walk_stops_at_the_first_failure() -> None:
    tops = np.array([1.0] * 5 + [0.5] * 5 + [-1.0] * 490)
    harmful = np.array([False] * 5 + [True] * 5 + [False] * 490)
    points = curve(tops, harmful, 0.1)
    assert (points[0].suppressed, points[0].harmed) == (5, 0)
    point = choose(points, 0.018)  # five harmed of 500 have the bound .01847
    assert point is not None
    assert point.tau == 0.51
    assert choose(points, 0.0185) == points[-1]
    assert choose(points, 0.004) is None
    dip = [replace(points[0], harm_ucb=0.5), *points[1:]]
    assert choose(dip, 0.02) is None


@pytest.mark.parametrize(
    ("score", "tau", "ends"),
    [
        (0.95, 0.9, "static"),
        (0.85, 0.9, "draft"),  # above the band, and not above the threshold
        (0.85, 0.5, "static"),
        (0.05, 0.02, "draft"),  # below the band, and not below the threshold
        (0.05, 0.5, "static"),
        (0.5, 0.5, "draft"),
    ],
)
def test_bands_give_way_to_the_threshold(score: float, tau: float, ends: str) -> None:
    made = policy(
        stages=[stage("static", 0, math.log(score / (1 - score)), 0.1, 0.8), stage("draft", 1, 0)],
        thresholds={"suppress": None},
    )
    verdict = replay(Cascade.of(made).at(tau), read_row(rows(1)[0]))
    assert verdict is not None
    assert verdict.stage == ends
