"""Fitting: the splits, the stages, the threshold and its guarantee, and the command line around them."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.errors import FitError, LabelError
from steering.gate_cascade import Cascade, score_of
from steering.gate_fit import FitSettings, Fitted, Identity, _thinned, fit
from steering.gate_judge import harm_curve, judge
from steering.gate_labels import Labels, read_labels
from steering.gate_policy import read_policy
from steering.gate_replay import reached, replay
from steering.gate_signals import Draft
from steering.gate_stages import Plan, Splits
from steering.gate_threshold import GRID, choose, curve
from steering.toolgate import Decision, NeedProbe, advance, start
from tests.steering.gate_world import asking, gate, policy, rows, stage, write_rows


def labels(path: Path, found: list[dict[str, Any]]) -> Labels:
    return read_labels(write_rows(path / "labels.jsonl", found))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Labels:
    return labels(tmp_path_factory.mktemp("gate"), rows(1500, stages=("draft", "samples", "ptrue")))


@pytest.fixture(scope="module")
def fitted(data: Labels) -> Fitted:
    return fit(data, FitSettings(epsilon=0.03))


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
    assert fitted.policy.probes.max_probe_tokens == 8 + 1 + 40
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
    values = [{**row.features["static"], **row.features["draft"]} for row in staying]
    known = np.mean([row.p_known >= 0.75 for row in staying])
    assert np.mean([score_of(second, one) for one in values]) == pytest.approx(known, abs=0.03)


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


def read_row(given_row: dict[str, Any]) -> Any:
    from steering.gate_labels import LabelRow
    from steering.gate_schema import parse

    return parse(LabelRow, json.dumps(given_row))


def _draft(row: Any) -> Draft:
    mean = row.features["draft"]["draft.mean_logprob"]
    return Draft("8", (mean,), ((-0.1,),), True)


def _samples(row: Any) -> Any:
    from steering.gate_signals import Samples

    share = round(5 * row.features["samples"]["samples.top_share"])
    return Samples(("same",) * share + tuple(f"other{i}" for i in range(5 - share)), 0, row.tokens["samples"])


Recorded = {"draft": _draft, "samples": _samples}


def test_the_guarantee_holds_over_many_calibration_sets(fitted: Fitted, tmp_path: Path) -> None:
    """Rows drawn from a large population whose harm at every threshold is known."""
    many = labels(tmp_path, rows(6000, 77, ("draft", "samples", "ptrue")))
    cascade = Cascade.of(fitted.policy)
    tops = np.array([reached(cascade, row) for row in many.rows])
    harmful = np.array([not row.correct_without and row.correct_with for row in many.rows])
    truth = {tau: float(((tops >= tau) & harmful).mean()) for tau in GRID}
    random = np.random.default_rng(5)
    for epsilon, delta in ((0.03, 0.1), (0.02, 0.2)):
        broken, suppressing, draws = 0, 0, 600
        for _ in range(draws):
            drawn = random.integers(0, 6000, 400)
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
    found = rows(50, stages=("draft",), model=other)
    judged = judge(fitted.policy, labels(tmp_path, found), 0.75, 0.1)
    assert any("rows are of base sha256:new" in one for one in judged.warnings)
    assert judged.effects.unasked > 0
    unasked = [one is None for one in judged.verdicts]
    assert sum(unasked) == judged.effects.unasked
    asked = judge(policy(), labels(tmp_path, rows(50)), 0.75, 0.1)
    assert any("the rows were asked with" in one for one in asked.warnings)
    points = harm_curve(fitted.policy, judged, 0.1)
    assert len(points) == len(GRID)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_rows(tmp_path / "train.jsonl", rows(1200))
    fresh = write_rows(tmp_path / "fresh.jsonl", rows(600, 5))
    out = tmp_path / "policy.json"
    assert gate("fit", train, "-o", out, "--epsilon", 0.04) == 0
    said = capsys.readouterr()
    for part in ("AUROC", "Brier", "threshold 0.", "overuse alpha*beta", "call rate", "harm at most", f"wrote {out}"):
        assert part in said.out
    made = read_policy(out)
    assert made.policy_id in said.out
    assert gate("eval", out, fresh) == 0
    assert "accuracy" in capsys.readouterr().out
    assert gate("eval", out, fresh, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 600
    assert found["before"]["overuse"]["value"] > found["after"]["overuse"]["value"]
    assert gate("eval", out, train) == 0
    assert "fitted on" in capsys.readouterr().err
    assert gate("report", out, fresh, "-o", tmp_path / "report") == 0
    for name in ("reliability.png", "risk_coverage.png"):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_pictures_of_a_gate_that_never_suppresses(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", rows(100))
    assert gate("fit", train, "-o", tmp_path / "policy.json") == 0
    assert gate("report", tmp_path / "policy.json", train, "-o", tmp_path / "report") == 0
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["risk_coverage.png"]


def test_without_matplotlib_the_report_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_rows(tmp_path / "train.jsonl", rows(600))
    gate("fit", train, "-o", tmp_path / "policy.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert gate("report", tmp_path / "policy.json", train, "-o", tmp_path / "report") == 1
    assert "pip install 'deltaworks[train]'" in capsys.readouterr().err


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_rows(tmp_path / "train.jsonl", rows(300))
    for arguments, message in (
        ((tmp_path / "none.jsonl", "-o", "x"), "cannot read"),
        ((train, "-o", tmp_path / "p.json", "--require", 0.99, "--epsilon", 0.5), "require 0.99 is not below"),
        ((train, "-o", tmp_path / "no" / "p.json"), "No such file"),
        ((train, "-o", tmp_path / "p.json", "--stages", "peek"), "no features of the stage peek"),
    ):
        assert gate("fit", *arguments) == 1
        assert message in capsys.readouterr().err
    for arguments in (("--epsilon", 0), ("--delta", 1.5), ("--stages", "drafts"), ("--suppress-mode", "x")):
        with pytest.raises(SystemExit):
            gate("fit", train, "-o", "p.json", *arguments)
    capsys.readouterr()
    assert gate("eval", train, train) == 1
    assert "is not a tool-gate policy" in capsys.readouterr().err
