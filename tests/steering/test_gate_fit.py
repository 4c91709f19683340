"""Fitting a policy: the splits, the stages, weights, what it is bound to; and judging it on other rows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steering.errors import FitError, LabelError
from steering.gate.cascade import raw_score, score_of
from steering.gate.fit import FitSettings, Fitted, Identity, _thinned, fit
from steering.gate.judge import harm_curve, judge
from steering.gate.labels import Labels
from steering.gate.models import centred, fit_isotonic
from steering.gate.stages import Plan, Splits
from steering.gate.threshold import GRID
from tests.steering.gate_world import labels, policy, rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Labels:
    return labels(tmp_path_factory.mktemp("gate"), rows(1500, stages=("draft", "samples", "ptrue")))


@pytest.fixture(scope="module")
def fitted(data: Labels) -> Fitted:
    return fit(data, FitSettings(epsilon=0.03))


@pytest.mark.slow
def test_a_fit_suppresses_what_is_known_and_keeps_harm_small(fitted: Fitted, tmp_path: Path) -> None:
    assert fitted.point is not None
    assert fitted.point.harm_ucb <= 0.03
    found = fitted.effects
    assert found.suppressed.value > 0.1
    assert found.after.overuse.value < 0.7 * found.before.overuse.value
    assert found.after.call_rate.value < found.before.call_rate.value
    assert found.before.overuse.value == pytest.approx(found.alpha.value * found.before.beta.value)  # type: ignore[union-attr]
    assert [one.name for one in fitted.policy.stages] == ["static", "draft", "ptrue", "samples"]
    assert (fitted.policy.probes.order, fitted.policy.probes.max_tokens) == (("draft", "ptrue", "samples"), 8)
    assert fitted.policy.probes.max_probe_tokens == 8 + 1 + 5 * 8
    static, draft = fitted.quality["static"], fitted.quality["draft"]
    assert static is not None
    assert draft is not None
    assert static.n == 525 > draft.n
    assert 0.7 < (static.auroc or 0) < 0.95
    assert found.score is not None
    assert (found.score.auroc or 0) > (static.auroc or 0)
    assert found.score.ece_mass < 0.1
    fresh = judge(fitted.policy, labels(tmp_path, rows(3000, 9, ("draft", "samples", "ptrue"))), 0.75, 0.1)
    assert fresh.effects.harm.value < 0.035
    assert fresh.effects.suppressed.value > 0.1


def test_a_stage_that_few_rows_reach_is_left_out(data: Labels) -> None:
    fitted = fit(data, FitSettings(epsilon=0.03, band=(0.3, 0.7)))
    assert [one.name for one in fitted.policy.stages] == ["static", "draft", "ptrue"]
    assert any("stage samples is left out: fewer than 10" in one for one in fitted.warnings)
    assert (fitted.policy.probes.order, fitted.policy.probes.max_probe_tokens) == (("draft", "ptrue"), 8 + 1)


def test_a_fit_is_a_function_of_rows_and_seed(data: Labels, fitted: Fitted) -> None:
    turned = replace(data, rows=data.rows[::-1])
    assert fit(turned, FitSettings(epsilon=0.03)).policy == fitted.policy
    assert fit(data, FitSettings(epsilon=0.03, seed=1)).policy.stages != fitted.policy.stages


def test_splits_are_disjoint_and_complete(data: Labels) -> None:
    splits = Splits.of(data.rows, (0.5, 0.2, 0.3), 3)
    ids = [{row.id for row in part} for part in (splits.fit, splits.calibrate, splits.judge)]
    assert [len(part) for part in ids] == [750, 300, 450]
    assert len(set.union(*ids)) == 1500
    for shares in ((0.5, 0.5, 0.0), (0.5, 0.2, 0.2), (0.5, 0.5)):
        with pytest.raises(FitError, match="shares above 0"):
            Splits.of(data.rows, shares, 0)  # type: ignore[arg-type]  # one is too short


def test_the_third_split_decides_alone_about_the_threshold(data: Labels) -> None:
    """Models are the same whatever the answers of the third split are; the threshold is not."""
    judged = {row.id for row in Splits.of(data.rows, FitSettings().shares, 0).judge}
    worse = tuple(
        row.model_copy(update={"correct_without": False, "correct_with": True}) if row.id in judged else row
        for row in data.rows
    )
    plain, spoilt = fit(data, FitSettings()), fit(replace(data, rows=worse), FitSettings())
    assert [one.logistic for one in plain.policy.stages] == [one.logistic for one in spoilt.policy.stages]
    assert [one.isotonic for one in plain.policy.stages] == [one.isotonic for one in spoilt.policy.stages]
    assert plain.point is not None
    assert spoilt.point is None or spoilt.point.tau > plain.point.tau
    assert spoilt.effects.harm.value < 0.02


def test_later_stages_are_calibrated_on_what_reaches_them(data: Labels, fitted: Fitted) -> None:
    first, second = fitted.policy.stages[:2]
    splits = Splits.of(data.rows, FitSettings().shares, 0)
    staying = [row for row in splits.calibrate if 0.1 <= score_of(first, row.features["static"]) <= 0.9]
    assert 0 < len(staying) < len(splits.calibrate)
    raw = np.array([raw_score(second, {**row.features["static"], **row.features["draft"]}) for row in staying])
    known = np.array([row.p_known >= 0.75 for row in staying], dtype=float)
    ones = np.ones(len(staying))
    assert centred(fit_isotonic(raw, known, ones), raw, ones) == second.isotonic


def test_too_few_or_too_harmful_rows_never_suppress(tmp_path: Path) -> None:
    few = fit(labels(tmp_path, rows(200)), FitSettings())
    assert few.policy.thresholds.suppress is None
    assert any("70 rows are there, and 114 are needed" in one for one in few.warnings)
    assert any("few rows to calibrate" in one for one in few.warnings)
    assert few.effects.suppressed.value == 0
    assert few.policy.eval is not None
    assert few.policy.eval.harm_ucb is None
    lost = rows(1500)
    for row in lost:
        row |= {"correct_without": False, "correct_with": True}
    assert fit(labels(tmp_path, lost), FitSettings()).effects.suppressed.value < 0.02


@pytest.mark.slow
def test_rows_of_live_logs_are_weighted_and_thinned(tmp_path: Path) -> None:
    """A third of the unknown questions was logged: weights bring alpha and the threshold's rows back."""
    everyone = rows(4000, 3)
    random = np.random.default_rng(0)
    logged = []
    for row in everyone:
        propensity = 1.0 if row["p_known"] >= 0.75 else 1 / 3
        if random.random() < propensity:
            logged.append({**row, "propensity": propensity})
    full, part = labels(tmp_path, everyone), labels(tmp_path, logged)
    truth = judge(policy(), full, 0.75, 0.1).effects
    weighted = judge(policy(), part, 0.75, 0.1).effects
    assert weighted.alpha.value == pytest.approx(truth.alpha.value, abs=0.02)
    assert weighted.harm.value == pytest.approx(truth.harm.value, abs=0.01)
    assert weighted.harm_ucb is None
    assert truth.harm_ucb is not None
    kept = _thinned(list(part.rows), 0)
    assert np.mean([row.p_known >= 0.75 for row in kept]) == pytest.approx(truth.alpha.value, abs=0.03)
    unweighted = np.mean([row.p_known >= 0.75 for row in part.rows])
    assert unweighted > truth.alpha.value + 0.15
    found = fit(part, FitSettings(epsilon=0.05))
    assert any("choose the threshold, so that all count alike" in one for one in found.warnings)
    assert found.effects.alpha.value == pytest.approx(truth.alpha.value, abs=0.04)


def test_stages_can_be_chosen(data: Labels) -> None:
    plan = Plan.of(data.rows, ("static", "ptrue"))
    assert (plan.order, plan.names) == (("draft", "ptrue"), ("static", "ptrue"))
    assert "draft.refusal" in plan.features("ptrue")
    assert "draft.refusal" not in plan.features("static")
    assert Plan.of(data.rows, ("samples", "static", "draft")).names == ("static", "samples", "draft")
    only = fit(data, FitSettings(epsilon=0.03, stages=("static",))).policy
    assert (only.probes.order, only.probes.max_probe_tokens) == ((), 0)
    with pytest.raises(FitError, match="row 'q0' has no features of the stage peek"):
        Plan.of(data.rows, ("peek",))


def test_a_stage_that_some_rows_lack_is_left_out(tmp_path: Path) -> None:
    found = rows(400)
    del found[3]["features"]["draft"]
    fitted = fit(labels(tmp_path, found), FitSettings())
    assert [one.name for one in fitted.policy.stages] == ["static"]
    assert any("stage draft is left out: 399 of 400" in one for one in fitted.warnings)


def test_kinds_budgets_and_binding(tmp_path: Path) -> None:
    found = rows(400, kinds={"calc[1]": "compute", "mail": "action"})
    for index, row in enumerate(found):
        row["n"] = 1 + index % 4
    made = fit(labels(tmp_path, found), FitSettings(budget_quantile=0.9)).policy
    assert made.kind_of("calc[1]") == ("compute", True)
    assert made.kind_of("calc1") == ("unknown", False)
    assert made.budgets == {"compute": 4}
    assert made.model.base_fingerprint == "sha256:base"
    bare = rows(400, model={"name": "tiny"})
    with pytest.raises(LabelError, match="do not say which base and chat template"):
        fit(labels(tmp_path, bare), FitSettings())
    made = fit(labels(tmp_path, bare), FitSettings(), Identity("sha256:x", "d" * 64, "")).policy
    assert (made.model.base_fingerprint, made.model.delta_digest, made.model.template_sha256) == (
        "sha256:x",
        "d" * 64,
        "",
    )


def test_mixed_rows_are_left_out_where_no_score_acts_on_them(data: Labels) -> None:
    kinds = {"calculator": "compute", "mail": "action"}
    some = tuple(
        row.model_copy(update={"kinds": kinds}) if place % 3 == 0 else row for place, row in enumerate(data.rows)
    )
    mixed = replace(data, rows=some)
    found = fit(mixed, FitSettings(epsilon=0.03, mixed="allow"))
    assert found.policy.mixed == "allow"
    assert sum(found.rows) == 1000
    assert "500 rows without lookup and compute tools alone are left out" in found.warnings
    judged = judge(found.policy, mixed, 0.75, 0.1)
    assert len(judged.rows) == 1000
    assert any("500 rows without lookup and compute tools alone" in one for one in judged.warnings)
    assert sum(fit(mixed, FitSettings(epsilon=0.03)).rows) == 1500
    with pytest.raises(FitError, match="no row has lookup and compute tools alone"):
        fit(replace(data, rows=some[::3]), FitSettings(mixed="allow"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": {"mail": "action"}}, "nothing to gate"),
        ({"p_known": 1.0}, "stage static, 160 rows to fit on: all rows are of one class"),
    ],
)
def test_rows_that_cannot_be_fitted(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FitError, match=message):
        fit(labels(tmp_path, rows(400, **change)), FitSettings())


def test_rows_that_do_not_belong_together(tmp_path: Path) -> None:
    for change, message in (
        ({"model": {"name": "other", "base_fingerprint": "b", "template_sha256": ""}}, "of different models"),
        ({"probes": {"k": 3}}, "asked in different ways"),
        ({"kinds": {"calculator": "lookup"}}, "'calculator' is compute in one row and lookup in another"),
    ):
        found = rows(400)
        found[7] |= change
        with pytest.raises(LabelError, match=message):
            fit(labels(tmp_path, found), FitSettings())
    with pytest.raises(FitError, match="too few for three splits"):
        fit(labels(tmp_path, rows(2)), FitSettings())
    with pytest.raises(FitError, match="no feature differs"):
        fit(labels(tmp_path, [{**rows(1)[0], "id": str(i)} for i in range(30)]), FitSettings())


def test_an_eval_says_what_is_doubtful(fitted: Fitted, data: Labels, tmp_path: Path) -> None:
    assert "these are the rows that the policy was fitted on" in judge(fitted.policy, data, 0.75, 0.1).warnings
    other = {"name": "tiny", "base_fingerprint": "sha256:new", "template_sha256": "f" * 64}
    found = rows(50, stages=(), model=other)
    judged = judge(fitted.policy, labels(tmp_path, found), 0.75, 0.1)
    assert any("rows are of base sha256:new" in one for one in judged.warnings)
    assert judged.effects.unasked > 0
    unasked = [one is None for one in judged.verdicts]
    assert sum(unasked) == judged.effects.unasked
    asked = judge(policy(), labels(tmp_path, rows(50)), 0.75, 0.1)
    assert any("the rows were asked with" in one for one in asked.warnings)
    points = harm_curve(fitted.policy, judged, 0.1)
    assert len(points) == len(GRID)
