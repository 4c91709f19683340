"""The three truths of the engine, on vLLM with a tiny Llama in fp32: alone equals mixed, served equals merged, and no key or value
of the cache crosses a delta. Each comparison is by tokens and by logprobs: tokens alone can agree by luck."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressors.artifact import Artifact
from compressors.decompress import delta_tensor
from server.engine.base import EngineDelta
from tests.engine.bed import Answer, Row, Runner, running

pytestmark = pytest.mark.engine

PROMPTS = [
    tuple(range(100, 119)),
    tuple(range(900, 907)),
    tuple(range(5000, 5064)),
    (7, 1234, 77, 4021),
]


def mixed_rows(deltas: list[EngineDelta]) -> list[Row]:
    """Base and every delta on every prompt."""
    return [Row(prompt, delta) for prompt in PROMPTS for delta in (None, *deltas)]


def merged(base: Path, delta: EngineDelta | None) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if delta is not None:
        weights = dict(model.named_parameters())
        with torch.no_grad(), Artifact.open(Path(delta.path)) as artifact:
            for name, record in artifact.records.items():
                if record.kind != "zero":
                    weights[name] += delta_tensor(artifact, name)
    return model


def oracle(model: torch.nn.Module, prompt: tuple[int, ...], count: int) -> Answer:
    """Greedy decoding without a cache: the plainest possible reference."""
    ids, logprobs = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            scores = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
    return Answer(tuple(ids[len(prompt) :]), tuple(logprobs), 0)


def assert_same(answer: Answer, expected: Answer, tolerance: float = 1e-4) -> None:
    assert answer.tokens == expected.tokens
    assert answer.logprobs == pytest.approx(expected.logprobs, abs=tolerance)


@pytest.fixture(scope="module")
def expected(tiny_base: Path, tiny_deltas: list[EngineDelta]) -> dict[tuple[str | None, tuple[int, ...]], Answer]:
    answers = {}
    for delta in (None, *tiny_deltas):
        model = merged(tiny_base, delta)
        for prompt in PROMPTS:
            answers[delta.digest if delta else None, prompt] = oracle(model, prompt, 24)
    return answers


def key(row: Row) -> tuple[str | None, tuple[int, ...]]:
    return row.delta.digest if row.delta else None, row.prompt


def test_the_deltas_differ_enough_to_be_told_apart(expected, tiny_deltas):
    for prompt in PROMPTS:
        answers = {expected[digest, prompt].tokens for digest in (None, *(delta.digest for delta in tiny_deltas))}
        assert len(answers) == 4


def test_served_equals_merged_in_one_mixed_batch(tiny_engine: Runner, tiny_deltas, expected):
    rows = mixed_rows(tiny_deltas)
    for row, answer in zip(rows, tiny_engine.answer(rows), strict=True):
        assert_same(answer, expected[key(row)])


@pytest.mark.parametrize("order", ["reversed", "grouped"])
def test_order_and_a_warm_prefix_cache_change_nothing(tiny_engine: Runner, tiny_deltas, expected, order):
    rows = mixed_rows(tiny_deltas)
    rows = rows[::-1] if order == "reversed" else sorted(rows, key=lambda row: row.delta.digest if row.delta else "")
    for row, answer in zip(rows, tiny_engine.answer(rows), strict=True):
        assert_same(answer, expected[key(row)])


def test_r2_alone_equals_mixed(tiny_engine: Runner, tiny_deltas, expected):
    for row in mixed_rows(tiny_deltas)[:8]:
        assert_same(tiny_engine.answer([row])[0], expected[key(row)])


def test_r3_the_prefix_cache_is_shared_within_a_delta_and_never_across_deltas_or_salts(
    tiny_engine: Runner, tiny_deltas
):
    prompt = tuple(range(20_000, 20_300))
    first, second = tiny_deltas[:2]
    cold = tiny_engine.answer([Row(prompt, first)], 4)[0]
    assert cold.cached == 0
    assert tiny_engine.answer([Row(prompt, second)], 4)[0].cached == 0
    assert tiny_engine.answer([Row(prompt)], 4)[0].cached == 0
    assert tiny_engine.answer([Row(prompt, first, cache_salt="tenant")], 4)[0].cached == 0
    warm = tiny_engine.answer([Row(prompt, first)], 4)[0]
    assert warm.cached >= 128
    assert_same(warm, cold)


def test_base_rows_are_bit_identical_whether_deltas_are_resident_or_not(tiny_engine: Runner, tiny_deltas):
    rows = [Row((*prompt, 1)) for prompt in PROMPTS]
    salted = [Row(row.prompt, cache_salt="without") for row in rows]
    resident = tiny_engine.answer(rows)
    for delta in tiny_deltas:
        tiny_engine.unload(delta)
    try:
        without = tiny_engine.answer(salted)
    finally:
        for delta in tiny_deltas:
            tiny_engine.load(delta)
    assert [(answer.tokens, answer.logprobs) for answer in resident] == [
        (answer.tokens, answer.logprobs) for answer in without
    ]


def test_reloading_gives_the_same_delta(tiny_engine: Runner, tiny_deltas, expected):
    row = Row(PROMPTS[0], tiny_deltas[0], cache_salt="reloaded")
    tiny_engine.unload(tiny_deltas[0])
    assert tiny_engine.load(tiny_deltas[0]) > 0
    assert_same(tiny_engine.answer([row])[0], expected[key(row)])


@pytest.fixture(params=["chunked_engine", "torch_engine"])
def tight_engine(request: pytest.FixtureRequest) -> Runner:
    return request.getfixturevalue(request.param)


def test_served_equals_merged_in_chunks_and_in_torchs_form(tight_engine: Runner, tiny_deltas, expected):
    rows = mixed_rows(tiny_deltas)
    for row, answer in zip(rows, tight_engine.answer(rows), strict=True):
        assert_same(answer, expected[key(row)])


def test_preempted_rows_continue_with_their_delta(tight_engine: Runner, tiny_base: Path, tiny_deltas):
    """Sixteen rows that grow into a second block each."""
    before = tight_engine.preemptions
    prompts = [tuple(range(start, start + 118)) for start in range(1000, 1800, 200)]
    rows = [Row(prompt, delta) for prompt in prompts for delta in (None, *tiny_deltas)]
    together = tight_engine.answer(rows)
    assert tight_engine.preemptions > before
    for delta in (None, *tiny_deltas):
        model = merged(tiny_base, delta)
        for row, answer in zip(rows, together, strict=True):
            if row.delta == delta:
                assert_same(answer, oracle(model, row.prompt, 24))


def test_served_equals_merged_with_one_delta_per_batch(tiny_base: Path, tiny_deltas, expected):
    with running(tiny_base, tiny_deltas, deltas_per_batch=1) as runner:
        rows = mixed_rows(tiny_deltas)
        for row, answer in zip(rows, runner.answer(rows), strict=True):
            assert_same(answer, expected[key(row)])
