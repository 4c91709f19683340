"""Combinations of up to four projection deltas, on engines of two forms."""

from pathlib import Path

import pytest

from server.engine.base import EngineDelta
from tests.engine.bed import Row, Runner
from tests.engine.test_combined_engine import combined, merged_file
from tests.engine.test_truths import PROMPTS, assert_same, merged, oracle

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("engine", ["torch_engine", "chunked_engine"])
def test_four_parts(
    engine: str, request: pytest.FixtureRequest, tiny_base: Path, tiny_deltas: list[EngineDelta], tmp_path: Path
):
    """The fourth part is a merged file itself. In torch's form, and in the kernel's by two threads."""
    runner: Runner = request.getfixturevalue(engine)
    fourth = merged_file(tiny_base, tmp_path / "fourth.safetensors", (tiny_deltas[0], 0.3), (tiny_deltas[1], 0.3))
    parts = [*zip(tiny_deltas, (0.5, -0.4, 0.6), strict=True), (fourth, 0.7)]
    file = merged_file(tiny_base, tmp_path / "file.safetensors", *parts)
    all_four = combined(*parts)
    rows = [Row(prompt, one) for prompt in PROMPTS[:2] for one in (all_four, None, tiny_deltas[0])]
    for one in (fourth, all_four):
        runner.load(one)
    try:
        answers = runner.answer(rows, 8)
    finally:
        runner.unload(all_four)
        runner.unload(fourth)
    models = {one: merged(tiny_base, file if one == all_four else one) for one in (all_four, None, tiny_deltas[0])}
    for row, answer in zip(rows, answers, strict=True):
        assert_same(answer, oracle(models[row.delta], row.prompt, 8))


def test_the_runner_stays_usable(tiny_engine: Runner, tiny_deltas: list[EngineDelta]):
    """Many weights of one pair, one after the other, leave nothing behind."""
    rows = [Row(prompt, tiny_deltas[0]) for prompt in PROMPTS]
    before = tiny_engine.answer(rows, 8)
    for i in range(3):
        both = combined((tiny_deltas[0], i / 4), (tiny_deltas[1], 1 - i / 4))
        tiny_engine.load(both)
        tiny_engine.answer([Row(PROMPTS[0], both)], 4)
        tiny_engine.unload(both)
    assert_same(tiny_engine.answer(rows, 8)[0], before[0])
