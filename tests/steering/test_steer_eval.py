import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steering.activations import load_model, load_tokenizer
from steering.answers import Answerer
from steering.collected import Collected
from steering.edits import spare_edit
from steering.errors import FitError, SteeringError
from steering.evaluate import (
    Rates,
    Result,
    Setting,
    Trial,
    act_add_edits,
    demonstrated,
    draw,
    measure,
    rates,
    spare_edits,
    table,
)
from steering.fit import FitSettings, fit, probe_of
from steering.formats import load_sae
from steering.profile import Profile
from steering.prompts import label
from steering.sweep import Grid, reached, selections_at, selections_of, sweep
from steering.tendency import gini, hoyer, kurtosis, probe_lines, tendency_lines
from tests.steering import small_world


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def found(root: Path) -> Collected:
    return small_world.collected(root)


@pytest.fixture(scope="module")
def answerer(root: Path) -> Answerer:
    model, _ = small_world.world(root)
    return Answerer(load_model(model), load_tokenizer(model))


@pytest.fixture(scope="module")
def profile(root: Path, found: Collected) -> Profile:
    fit(found, small_world.saes(root), root / "evaluated.safetensors", FitSettings(share=0.5))
    return Profile.open(root / "evaluated.safetensors")


@pytest.fixture(scope="module")
def trial(found: Collected) -> Trial:
    return Trial(found.held_out(), found.pool(), seeds=(1, 2))


def line(results: list[Result], kind: str, method: str, direction: str = "") -> Rates:
    (one,) = [r for r in results if (r.kind, r.method, r.direction) == (kind, method, direction)]
    return one.mean


def test_items_are_asked_after_others_of_their_category(found: Collected) -> None:
    kinds = {fact.group: "abc"[index % 3] for index, fact in enumerate([*found.pool(), *found.held_out()])}
    pool = [replace(fact, category=kinds[fact.group]) for fact in found.pool()]
    items = [replace(fact, category=kinds[fact.group]) for fact in found.held_out()] + pool
    asked = demonstrated(Trial(items, pool), 1)
    assert sorted(number for _, numbers in asked for number in numbers) == list(range(len(items)))
    for shown, numbers in asked:
        assert len({fact.group for fact in shown}) == 3
        assert {fact.category for fact in shown} == {items[number].category for number in numbers}
        assert {fact.group for fact in shown}.isdisjoint(items[number].group for number in numbers)
    assert len(demonstrated(Trial(items, pool, same_category=False), 1)) == 2


def test_rates_count_flips_among_what_was_answered_before() -> None:
    before = [1, 1, 1, 1, 0, 0, None, None, None, None]
    after = [0, 1, 1, None, 0, 1, 1, None, None, 0]
    found = rates(before, after)
    assert found == Rates(40.0, 30.0, 25.0, 50.0, 50.0, 50.0)
    assert rates([1], [1]).memory_to_context is None


def test_no_control_is_what_the_model_does(answerer: Answerer, trial: Trial) -> None:
    results = measure(answerer, trial, [])
    even = 100 * sum(int(item.group.removeprefix("q")) % 2 == 0 for item in trial.items) / len(trial.items)
    for kind in ("agree", "against"):
        plain = line(results, kind, "no control")
        assert plain.em_context == pytest.approx(even, abs=10)
        assert plain.em_memory == pytest.approx(100 - even, abs=10)
        assert (plain.memory_to_memory, plain.context_to_memory) == (100, 0)


def test_icl_is_no_control_under_the_other_demonstrations(answerer: Answerer, trial: Trial) -> None:
    results = measure(answerer, trial, [])
    assert line(results, "agree", "ICL", "use_parameter").em_memory == line(results, "against", "no control").em_memory
    assert line(results, "against", "ICL", "use_context").em_context == line(results, "agree", "no control").em_context
    assert len(results) == 4


def test_an_edit_that_dictates_an_answer_is_counted_as_such(answerer: Answerer, trial: Trial) -> None:
    """The last stream is replaced by the direction of one word, so the rates are known beforehand."""
    word = answerer.tokens(" a7")[0]
    direction = 100 * answerer.model.lm_head.weight[word] / answerer.model.model.norm.weight
    dictate = Setting("dictate", "use_context", {1: lambda rows: direction.expand_as(rows)}, {})
    results = measure(answerer, trial, [dictate])
    shares = {side: 100 * sum(label("a7", one) == side for one in trial.items) / len(trial.items) for side in (0, 1)}
    assert sum(shares.values()) > 0
    for kind in ("agree", "against"):
        found = line(results, kind, "dictate", "use_context")
        assert (found.em_context, found.em_memory) == (shares[1], shares[0])


def test_spare_edits_are_the_published_edit(profile: Profile, root: Path) -> None:
    rows = torch.randn(5, small_world.WIDTH, generator=torch.Generator().manual_seed(1))
    sae, chosen = load_sae(small_world.saes(root)[1]), profile.layers[1]
    z_context, z_parameter = torch.zeros(256), torch.zeros(256)
    z_context[chosen.context.ids], z_parameter[chosen.parameter.ids] = chosen.z_context, chosen.z_parameter
    for direction in ("use_context", "use_parameter"):
        expected = spare_edit(
            rows, sae, chosen.context.ids, chosen.parameter.ids, z_context, z_parameter, direction, 2.0
        )
        edited = spare_edits(profile.tables(direction, 2.0))[1](rows)
        torch.testing.assert_close(edited, expected, rtol=0.02, atol=0.02)  # the profile's rows are rounded to bf16
        assert float((edited - rows).abs().max()) > 0.5


def test_every_setting_is_measured_on_every_prompt(
    answerer: Answerer, trial: Trial, profile: Profile, found: Collected
) -> None:
    spare = Setting("SpARE", "use_context", spare_edits(profile.tables("use_context", 3.0)), {"strength": 3.0})
    act_add = Setting("ActAdd", "use_parameter", act_add_edits(found, (0, 1), "use_parameter", 2.0), {})
    together = measure(answerer, trial, [spare, act_add])
    alone = measure(answerer, trial, [act_add])
    for kind in ("agree", "against"):
        plain = line(together, kind, "no control")
        assert line(together, kind, "SpARE", "use_context").em_context != plain.em_context
        assert line(together, kind, "ActAdd", "use_parameter") == line(alone, kind, "ActAdd", "use_parameter")


def test_strength_zero_changes_no_answer(answerer: Answerer, trial: Trial, profile: Profile) -> None:
    edits = spare_edits(profile.tables("use_parameter", 0.0))
    results = measure(answerer, trial, [Setting("SpARE", "use_parameter", edits, {})])
    for kind in ("agree", "against"):
        assert line(results, kind, "SpARE", "use_parameter") == line(results, kind, "no control")


def test_act_add_is_the_mean_difference_with_the_directions_sign(found: Collected) -> None:
    samples = found.samples(1)
    difference = samples.h[samples.labels == 1].mean(0) - samples.h[samples.labels == 0].mean(0)
    rows = torch.randn(3, small_world.WIDTH, generator=torch.Generator().manual_seed(0))
    for direction, sign in (("use_context", 1), ("use_parameter", -1)):
        edit = act_add_edits(found, [1], direction, 0.5)[1]  # type: ignore[arg-type]  # from a list of cases
        torch.testing.assert_close(edit(rows), rows + sign * 0.5 * difference)
        assert edit(rows.bfloat16()).dtype == torch.bfloat16


def test_items_of_the_pool_do_not_see_themselves(answerer: Answerer, found: Collected) -> None:
    """Of two trials that differ in the pool's order only, each item is asked once, whatever is shown."""
    trial = Trial(found.known_pool(), found.pool(), kinds=("agree",), seeds=(3,))
    (result,) = [one for one in measure(answerer, trial, []) if one.method == "no control"]
    assert result.mean.em_context + result.mean.em_memory > 90
    small = Trial(found.known_pool(), found.pool()[:5], kinds=("agree",))
    with pytest.raises(SteeringError, match="a pool of 5 groups is too small for 6 demonstrations"):
        measure(answerer, small, [])


def test_what_cannot_be_measured(answerer: Answerer, found: Collected) -> None:
    with pytest.raises(SteeringError, match="no item to ask"):
        measure(answerer, Trial([], found.pool()), [])
    with pytest.raises(SteeringError, match="prompt kind 'dss' is not one of agree, against"):
        measure(answerer, Trial(found.held_out(), found.pool(), kinds=("dss",)), [])


def test_a_draw_is_fixed_and_keeps_the_order(found: Collected) -> None:
    items = found.held_out()
    few = draw(items, 5)
    assert few == draw(items, 5) == [item for item in items if item in few]
    assert len(few) == 5
    assert draw(items, None) == draw(items, 99) == items


def test_a_sweep_tries_every_combination_and_puts_the_best_first(
    answerer: Answerer, found: Collected, profile: Profile, root: Path
) -> None:
    trial = Trial(draw(found.known_pool(), 10), found.pool(), seeds=(1,))
    selections = selections_at(found, small_world.saes(root), (0.1, 0.5), FitSettings())
    grid = Grid(layers=((0, 1), (1,)), strengths=(1.0, 3.0), act_add=(1.0,))
    results = sweep(answerer, found, selections, grid, trial)
    assert [one.method for one in results].count("SpARE") == 2 * 2 * 2 * 2
    assert [one.method for one in results].count("ActAdd") == 2 * 2
    for direction, kind in (("use_parameter", "agree"), ("use_context", "against")):
        of_direction = [one for one in results if one.direction == direction]
        assert {one.kind for one in of_direction} == {kind}
        assert [reached(one) for one in of_direction] == sorted(map(reached, of_direction), reverse=True)
    with pytest.raises(FitError, match="layer 5 is not fitted"):
        sweep(answerer, found, selections_of(profile), Grid(((5,),), (1.0,)), trial)
    assert list(selections_of(profile)) == [0.5]


def test_the_table_shows_every_line(answerer: Answerer, trial: Trial) -> None:
    results = measure(answerer, trial, [Setting("SpARE", "use_context", {}, {"layers": (0, 1), "strength": 2.0})])
    lines = table(results).splitlines()
    assert len(lines) == 1 + len(results)
    assert lines[0].split() == ["prompt", "direction", "method", "EM_C", "EM_M", "C->M", "M->C", "M->M", "C->C"]
    assert any("SpARE layers=0,1 strength=2" in one for one in lines)


def test_statistics_of_skewed_rows() -> None:
    one_hot, flat = torch.zeros(1, 64), torch.ones(1, 64)
    one_hot[0, 5] = -3.0
    assert float(hoyer(one_hot)) == pytest.approx(1)
    assert float(hoyer(flat)) == pytest.approx(0, abs=1e-6)
    assert float(gini(flat)) == pytest.approx(0, abs=1e-6)
    assert float(gini(one_hot)) == pytest.approx(1 - 1 / 64)
    normal = torch.randn(4, 20000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kurtosis(normal), torch.full((4,), 3.0), atol=0.2, rtol=0)


def test_the_probe_report(found: Collected) -> None:
    lines = probe_lines(found)
    assert [one.layer for one in lines] == [0, 1]
    expected = probe_of(found, 1)
    assert (lines[1].auroc, lines[1].accuracy, lines[1].n) == (expected.auroc, expected.accuracy, expected.n)
    tendencies = tendency_lines(found)
    assert len(tendencies) == 2 * 3
    assert all(0 <= one.auroc <= 1 for one in tendencies)
    assert json.dumps([one.statistic for one in tendencies[:3]]) == '["kurtosis", "hoyer", "gini"]'
