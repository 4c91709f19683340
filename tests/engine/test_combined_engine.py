"""Combinations of deltas on the real engine: the sum equals the artifact merged by Task Arithmetic, and nothing else changes."""

from pathlib import Path

import pytest

from compressors.merge import MergeConfig, merge
from server.artifacts.combination import combination
from server.core import Sampling
from server.engine.base import EngineDelta, EngineLoadError, WeightedDelta
from server.engine.sampling import sampling_params
from tests.engine.bed import Row
from tests.engine.conftest import World
from tests.engine.test_truths import PROMPTS, assert_same, merged, oracle

pytestmark = pytest.mark.engine

WEIGHTS = (0.6, 0.7)


def combined(*parts: tuple[EngineDelta, float]) -> EngineDelta:
    return combination([WeightedDelta(delta, weight) for delta, weight in parts], chat=False)


def merged_file(base: Path, path: Path, *parts: tuple[EngineDelta, float]) -> EngineDelta:
    weights = tuple(weight for _, weight in parts)
    merge([Path(delta.path) for delta, _ in parts], base, path, MergeConfig(weights=weights))
    return EngineDelta(digest="e" * 64, path=str(path))


def test_a_combination_equals_the_merged_artifact_beside_its_parts_and_the_base(
    world: World,
    tmp_path: Path,
):
    """Projections, embedding, head, norms and biases; every row against the oracle with its weights merged in."""
    parts = ((world.whole, WEIGHTS[0]), (world.projections, WEIGHTS[1]))
    both, file = combined(*parts), merged_file(world.base, tmp_path / "both.safetensors", *parts)
    who = (both, None, world.whole, file, world.projections)
    rows = [Row(prompt, one) for prompt in PROMPTS for one in who]
    assert world.runner.load(file) > 0
    assert world.runner.load(both) > 0
    try:
        answers = dict(zip(rows, world.runner.answer(rows, 10), strict=True))
    finally:
        world.runner.unload(both)
        world.runner.unload(file)
    for one in (file, None, world.whole, world.projections):
        model = merged(world.base, one)
        for prompt in PROMPTS:
            expected = oracle(model, prompt, 10)
            assert_same(answers[Row(prompt, one)], expected)
            if one == file:
                assert_same(answers[Row(prompt, both)], expected)
    for prompt in PROMPTS:
        for other in (None, world.whole, world.projections):
            assert answers[Row(prompt, both)].logprobs != pytest.approx(answers[Row(prompt, other)].logprobs, abs=1e-2)


def test_it_costs_little_beside_its_parts_and_leaves_them_and_the_base_as_they_were(world: World):
    bases = [Row((*prompt, 3)) for prompt in PROMPTS]
    rows = [Row((*prompt, 3), one) for prompt in PROMPTS for one in (world.whole, world.projections)]
    before, plain = world.runner.answer(rows, 8), world.runner.answer(bases, 8)
    both = combined((world.whole, -1.0), (world.projections, 2.0))
    nbytes = world.runner.load(both)
    beside = world.runner.answer([Row(row.prompt, row.delta, "with") for row in rows], 8)
    beside_plain = world.runner.answer([Row(row.prompt, cache_salt="with") for row in bases], 8)
    world.runner.unload(world.projections)
    try:
        assert nbytes < 0.2 * world.runner.load(world.projections)
    finally:
        world.runner.unload(both)
    after = world.runner.answer([Row(row.prompt, row.delta, "after") for row in rows], 8)
    for found in (beside, after):
        for answer, expected in zip(found, before, strict=True):
            assert_same(answer, expected)
    assert [(a.tokens, a.logprobs) for a in plain] == [(a.tokens, a.logprobs) for a in beside_plain]


def test_r3_keys_and_values_are_of_the_combination_alone(world: World):
    prompt = tuple(range(30_000, 30_300))
    one = combined((world.whole, 0.5), (world.projections, 0.5))
    other = combined((world.whole, 0.5), (world.projections, 0.25))
    for both in (one, other):
        world.runner.load(both)
    try:
        cold = world.runner.answer([Row(prompt, one)], 4)[0]
        assert cold.cached == 0
        for row in (Row(prompt, other), Row(prompt), Row(prompt, world.whole), Row(prompt, world.projections)):
            assert world.runner.answer([row], 4)[0].cached == 0
        warm = world.runner.answer([Row(prompt, one)], 4)[0]
        assert warm.cached >= 128
        assert_same(warm, cold)
    finally:
        for both in (one, other):
            world.runner.unload(both)


def test_a_part_that_is_not_resident_is_refused(world: World):
    absent = EngineDelta(digest="f" * 64, path=world.whole.path)
    with pytest.raises(EngineLoadError, match="not resident"):
        world.runner.load(combined((absent, 1.0), (world.whole, 1.0)))


def test_end_tokens_of_the_base_stand_beside_a_parts_own_where_another_part_keeps_them():
    own, plain = EngineDelta("a" * 64, "", stop_ids=(7,)), EngineDelta("b" * 64, "")
    for delta, ignores in ((own, True), (plain, False), (combined((own, 1), (plain, 1)), False)):
        params = sampling_params(Sampling(max_tokens=4), delta)
        assert (params.ignore_eos, params.stop_token_ids) == (ignores, list(delta.stop_ids))
