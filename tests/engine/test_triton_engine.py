"""The GPU's data plane in the real engine, its kernels under Triton's interpreter: served equals merged, after a drop too."""

import os

import pytest

from tests.compressors.triton_folder import triton_environment
from tests.engine.bed import Row, Runner, engine_settings
from tests.engine.test_truths import PROMPTS, assert_same, merged, oracle

pytestmark = pytest.mark.engine
TOKENS = 3


@pytest.fixture
def slot_runner(tiny_base, monkeypatch):
    environment = triton_environment(interpret=True)
    for name in ("PYTHONPATH", "TRITON_INTERPRET"):  # the worker is a child process
        monkeypatch.setenv(name, environment[name])
    for folder in environment["PYTHONPATH"].split(os.pathsep):
        monkeypatch.syspath_prepend(folder)  # which a spawned child takes over
    runner = Runner(tiny_base, engine_settings(kernel="triton", max_resident_deltas=2, deltas_per_batch=2))
    yield runner
    runner.stop()


def test_served_equals_merged(slot_runner, tiny_base, tiny_deltas):
    assert slot_runner.engine.kernel == "triton-slots"
    one, two, three = tiny_deltas
    for delta in (one, two):
        assert slot_runner.load(delta) > 0
    models = {None: merged(tiny_base, None)} | {delta: merged(tiny_base, delta) for delta in tiny_deltas}

    def check(deltas):
        rows = [Row(prompt, delta) for prompt, delta in zip(PROMPTS, deltas, strict=False)]
        for row, answer in zip(rows, slot_runner.answer(rows, TOKENS), strict=True):
            assert_same(answer, oracle(models[row.delta], row.prompt, TOKENS))

    check((one, None, two))
    slot_runner.unload(one)
    slot_runner.load(three)  # into the slot that became free
    check((three, two, None))
