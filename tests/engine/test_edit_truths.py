"""Per-request edits of the stream on vLLM with a tiny Llama in fp32: they equal a hook in transformers, however they are batched,
cut, preempted and cached, and they never reach another request."""

import json
from pathlib import Path

import pytest
import torch

from server.engine.base import EngineEdit, EngineError, EngineLoadError
from steering.profile import Profile
from tests.engine.bed import Answer, Row, Runner
from tests.engine.edit_bed import (
    PROBE_LAYER,
    Edits,
    Oracle,
    edit,
    edited_positions,
    tables_of,
    write_random_profile,
    write_random_sae,
)
from tests.engine.test_truths import assert_same, merged

pytestmark = pytest.mark.engine

COUNT = 12
BLOCK = 128
PROMPTS = [tuple(range(100, 119)), tuple(range(900, 907)), tuple(range(5000, 5064)), (7, 1234, 77, 4021)]
FEATURES = [(3, "set", 0.8), (9, "add", -0.5), (21, "scale", 3.0), (40, "ablate", 0.0), (50, "raise", 1.5)]


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Edits:
    folder = tmp_path_factory.mktemp("edits")
    write_random_profile(folder / "profile.safetensors")
    for layer in (0, 1, 2):
        write_random_sae(folder / f"sae-{layer}.safetensors", layer)
    return Edits(folder)


@pytest.fixture(scope="module")
def made(edits: Edits) -> dict[str, EngineEdit]:
    features = edits.sae(1, *FEATURES)
    return {
        "last": edit(edits.profile("use_context")),
        "other-direction": edit(edits.profile("use_parameter", 1.5, "delta")),
        "all": edit(features, prompt="all"),
        "positions": edit(features, edits.sae(0, (1, "set", 2.0)), prompt={"positions": [0, 2, -2]}),
        "window": edit(edits.profile("use_context"), features, prompt={"window": [-3, None]}),
        "generation": edit(features, prompt=None, generation="all"),
        "both": edit(edits.profile("use_parameter"), generation={"window": [2, 6]}),
        "everywhere": edit(features, prompt="all", generation="all"),
    }


@pytest.fixture(scope="module")
def runner(tiny_engine: Runner, made) -> Runner:
    """The engine of the deltas, with every edit resident."""
    for each in made.values():
        tiny_engine.load_edit(each)
    return tiny_engine


@pytest.fixture(scope="module")
def oracle(tiny_base: Path) -> Oracle:
    return Oracle.of(tiny_base)


@pytest.fixture(scope="module")
def expected(oracle: Oracle, made) -> dict[tuple[str | None, tuple[int, ...]], Answer]:
    asked = [(None, None), *made.items()]
    return {(name, prompt): oracle.answer(prompt, each, COUNT) for name, each in asked for prompt in PROMPTS}


def mixed(made: dict[str, EngineEdit]) -> list[tuple[str | None, Row]]:
    """Every edit and none on every prompt."""
    asked = [(None, None), *made.items()]
    return [(name, Row(prompt, edit=each)) for prompt in PROMPTS for name, each in asked]


def assert_all_same(rows: list[tuple[str | None, Row]], answers: list[Answer], expected) -> None:
    for (name, row), answer in zip(rows, answers, strict=True):
        assert_same(answer, expected[name, row.prompt])
        assert_report(row, answer)


def assert_report(row: Row, answer: Answer) -> None:
    """The worker's counters name exactly the positions that were fed through the model."""
    if row.edit is None:
        return
    fed = len(row.prompt) + len(answer.tokens) - 1
    positions = edited_positions(json.loads(row.edit.spec), len(row.prompt), fed)
    report = answer.report
    assert report is not None
    assert report.applied is bool(positions)
    assert report.positions == tuple(positions)
    assert [layer.layer for layer in report.layers] == sorted(tables_of(row.edit))
    assert {layer.rows for layer in report.layers} == {len(positions)}


def test_the_edits_differ_enough_to_be_told_apart(expected, made):
    for prompt in PROMPTS:
        answers = {expected[name, prompt].tokens for name in (None, *made)}
        assert len(answers) == 1 + len(made)


def test_edits_equal_a_hook_in_one_mixed_batch(runner: Runner, made, expected):
    rows = mixed(made)
    assert_all_same(rows, runner.answer([row for _, row in rows], COUNT), expected)


def test_r2_alone_equals_mixed(runner: Runner, made, expected):
    rows = mixed(made)[:9]
    assert_all_same(rows, [runner.answer([row], COUNT)[0] for _, row in rows], expected)


def test_the_report_counts_what_the_tables_say(runner: Runner, made, oracle: Oracle):
    prompt = PROMPTS[0]
    report = runner.answer([Row(prompt, edit=made["other-direction"])], 1)[0].report
    first, _ = report.layers
    table = tables_of(made["other-direction"])[first.layer][0]
    h = oracle.stream(prompt, first.layer)[-1:]
    raised, lowered = (int(count) for count in table.counts(h))
    assert (first.raised, first.lowered) == (raised, lowered)
    assert raised > 0 < lowered
    assert first.rel_norm == pytest.approx(float(table.delta(h).norm() / h.norm()), rel=1e-4)
    assert runner.loop.run_until_complete(runner.engine.edit_report("never-seen")) is None


def test_plain_rows_beside_steered_ones_are_bit_identical(runner: Runner, made):
    plain = [Row((*prompt, 1)) for prompt in PROMPTS]
    before = runner.answer([*plain, Row(PROMPTS[0])], COUNT)[:-1]
    beside = runner.answer([*plain, Row(PROMPTS[0], edit=made["everywhere"])], COUNT)[:-1]
    assert [(a.tokens, a.logprobs) for a in before] == [(a.tokens, a.logprobs) for a in beside]


def test_r2_a_delta_and_an_edit_in_the_same_request(runner: Runner, made, tiny_base: Path, tiny_deltas):
    delta = tiny_deltas[0]
    model = Oracle(merged(tiny_base, delta))
    rows = [Row(prompt, delta, edit=made[name]) for prompt in PROMPTS for name in ("last", "everywhere")]
    answers = runner.answer([*rows, Row(PROMPTS[0]), Row(PROMPTS[0], delta)], COUNT)
    for row, answer in zip(rows, answers, strict=False):
        assert_same(answer, model.answer(row.prompt, row.edit, COUNT))
        assert answer.tokens != model.answer(row.prompt, None, COUNT).tokens


def test_every_child_of_a_request_is_edited(runner: Runner, made, expected):
    for name in ("last", "generation"):
        found = runner.choices(Row(PROMPTS[0], edit=made[name]), COUNT, n=2)
        for answer in found:
            assert_same(answer, expected[name, PROMPTS[0]])
        rows = COUNT - 1 if name == "generation" else 1
        assert {layer.rows for layer in found[0].report.layers} == {2 * rows}


# The prefix cache


def cold(runner: Runner, row: Row, count: int) -> Answer:
    """The row's answer from an empty cache: a salt that nobody else uses."""
    cold.salts += 1
    answer = runner.answer([Row(row.prompt, row.delta, f"cold-{cold.salts}", row.edit)], count)[0]
    assert answer.cached == 0
    return answer


cold.salts = 0


@pytest.mark.parametrize("length", [2 * BLOCK, 2 * BLOCK + 44], ids=["on-a-boundary", "off-a-boundary"])
def test_r3_plain_and_steered_requests_share_the_unedited_prefix_only(runner: Runner, made, length):
    prompt = tuple(range(length * 50, length * 51))
    shared = (length - 1) // BLOCK * BLOCK  # the blocks before the one that holds the last prompt position
    plain, steered = Row(prompt), Row(prompt, edit=made["last"])
    count = 3 * BLOCK - length + 4  # fills the third block
    cold_plain, cold_steered = cold(runner, plain, COUNT), cold(runner, steered, count)
    assert cold_plain.tokens != cold_steered.tokens[:COUNT]
    for row, same, cached in (
        (plain, cold_plain, 0),
        (steered, cold_steered, shared),
        (plain, cold_plain, shared),
        (steered, cold_steered, shared),
    ):
        answer = runner.answer([row], len(same.tokens))[0]
        assert_same(answer, same)
        assert answer.cached == cached
    # A second turn: the steered answer is history now, and its steered keys are nobody's history.
    history = (*prompt, *cold_steered.tokens, 5, 6, 7)
    for name, cached in ((None, 2), ("last", 3), ("other-direction", 3)):  # the plain turn leaves a third plain block
        row = Row(history, edit=made[name] if name else None)
        again = runner.answer([row], 8)[0]
        assert again.cached == cached * BLOCK
        assert_same(again, cold(runner, row, 8))


def test_r3_a_steered_cache_is_never_read_by_plain_requests(runner: Runner, made):
    """Steered first, so that only steered blocks are there to be read."""
    prompt = tuple(range(30_000, 30_000 + 2 * BLOCK + 10))
    steered = runner.answer([Row(prompt, edit=made["last"])], BLOCK)[0]
    assert steered.cached == 0
    history = (*prompt, *steered.tokens)
    for row in (Row(history[: 2 * BLOCK + 30]), Row(history)):
        answer = runner.answer([row], 8)[0]
        assert answer.cached == 2 * BLOCK
        assert_same(answer, cold(runner, row, 8))


def test_the_plain_row_of_a_comparison_is_the_plain_row_and_shares_the_prefix(runner: Runner, made):
    """Started together with the steered row, as the gateway does, from an empty cache."""
    prompt = tuple(range(44_000, 44_000 + 2 * BLOCK + 10))

    def pair(first: EngineEdit | None, salt: str) -> list[Answer]:
        return runner.answer([Row(prompt, None, salt, first), Row(prompt, None, salt)], COUNT)

    alone, (steered, beside) = pair(None, "pair-plain")[1], pair(made["last"], "pair-compared")
    assert (beside.tokens, beside.logprobs) == (alone.tokens, alone.logprobs)
    assert steered.tokens != beside.tokens
    assert (steered.cached, beside.cached) == (0, 2 * BLOCK)


def test_edits_of_the_whole_prompt_share_among_themselves(runner: Runner, made):
    prompt = tuple(range(33_000, 33_000 + 2 * BLOCK + 20))
    longer = (*prompt, *range(200, 330))
    runner.answer([Row(prompt)], 2)
    first = runner.answer([Row(prompt, edit=made["all"])], 4)[0]
    assert first.cached == 0
    second = runner.answer([Row(longer, edit=made["all"])], 4)[0]
    assert second.cached == 2 * BLOCK
    same = cold(runner, Row(longer, edit=made["all"]), 4)
    assert_same(second, same)
    assert second.report.positions == same.report.positions == tuple(range(len(longer)))
    assert {layer.rows for layer in second.report.layers} == {len(longer) - 2 * BLOCK}
    assert runner.answer([Row(prompt, edit=made["everywhere"])], 4)[0].cached == 0


def test_generated_positions_are_keyed_from_the_first_one(runner: Runner, made):
    prompt = tuple(range(36_000, 36_000 + 2 * BLOCK))
    row = Row(prompt, edit=made["generation"])
    answer = runner.answer([row], BLOCK + 2)[0]
    history = Row((*prompt, *answer.tokens))
    again = runner.answer([history], 4)[0]
    assert again.cached == 2 * BLOCK
    assert_same(again, cold(runner, history, 4))


# Probe and condition


@pytest.fixture(scope="module")
def scores(edits: Edits, oracle: Oracle) -> list[float]:
    probe = Profile.open(Path(edits.probe()["path"])).probe
    return [float(probe.score(oracle.stream(prompt, PROBE_LAYER)[-1:])) for prompt in PROMPTS]


def test_a_probe_alone_scores_and_changes_nothing(runner: Runner, edits: Edits, scores, expected):
    probe = edit(prompt=None, probe=edits.probe())
    runner.load_edit(probe)
    assert max(scores) - min(scores) > 0.05
    answers = runner.answer([Row(prompt, edit=probe) for prompt in PROMPTS], COUNT)
    for prompt, answer, score in zip(PROMPTS, answers, scores, strict=True):
        assert_same(answer, expected[None, prompt])
        assert (answer.report.applied, answer.report.positions, answer.report.layers) == (False, (), ())
        assert answer.report.score == pytest.approx(score, abs=1e-4)
    long = tuple(range(40_000, 40_000 + 2 * BLOCK + 5))
    runner.answer([Row(long)], 2)
    assert runner.answer([Row(long, edit=probe)], 2)[0].cached == 2 * BLOCK


def test_the_score_is_that_of_the_unedited_state(runner: Runner, edits: Edits, scores, expected):
    scored = edit(edits.profile("use_context"), probe=edits.probe())  # edits the very layer that the probe reads
    runner.load_edit(scored)
    for prompt, score in zip(PROMPTS, scores, strict=True):
        answer = runner.answer([Row(prompt, edit=scored)], COUNT)[0]
        assert answer.report.score == pytest.approx(score, abs=1e-4)
        assert_same(answer, expected["last", prompt])


@pytest.mark.parametrize("name", ["last", "generation"])
def test_a_condition_decides_per_request(runner: Runner, edits: Edits, made, scores, expected, name):
    at_least = sum(sorted(scores)[1:3]) / 2  # half of the prompts reach it
    spec = json.loads(made[name].spec)
    guarded = edit(
        *spec["tables"],
        prompt=spec["prompt"],
        generation=spec["generation"],
        probe=edits.probe(),
        at_least=at_least,
    )
    runner.load_edit(guarded)
    answers = runner.answer([Row(prompt, edit=guarded) for prompt in PROMPTS], COUNT)
    applied = []
    for prompt, answer, score in zip(PROMPTS, answers, scores, strict=True):
        assert answer.report.score == pytest.approx(score, abs=1e-4)
        assert answer.report.applied is (score >= at_least)
        assert_same(answer, expected[name if score >= at_least else None, prompt])
        applied.append(answer.report.applied)
    assert sorted(applied) == [False, False, True, True]


# What cannot be loaded


def test_what_does_not_fit_is_refused_and_the_engine_lives(
    runner: Runner, edits: Edits, made, tmp_path: Path, expected
):
    write_random_profile(tmp_path / "profile.safetensors", width=64, probe=False)
    (tmp_path / "sae-1.safetensors").write_bytes(b"\x80\x04 no SAE")
    wrong, gone = Edits(tmp_path), Edits(tmp_path / "gone")
    late = {"window": [-2, None]}
    refused = {
        "cannot be loaded": edit(gone.profile("use_context")),
        "gone": edit(prompt=None, probe=gone.probe()),
        "width 64": edit(wrong.profile("use_context")),
        "no conflict probe": edit(prompt=None, probe=wrong.probe()),
        "pickle": edit(wrong.sae(1, (1, "set", 1.0))),
        "direction": edit(edits.profile("use_nothing")),
        "strength": edit(edits.profile("use_context", -1.0)),
        "layer 7 does not exist": edit(edits.sae(1, *FEATURES) | {"layer": 7}),
        "64": edit(edits.sae(1, (LATENTS_TOO_FAR, "set", 1.0))),
        "twice": edit(edits.sae(1, (1, "set", 1.0), (1, "add", 1.0))),
        "last prompt position": edit(edits.profile("use_context"), prompt=late, probe=edits.probe(), at_least=0.5),
        "needs a probe": edit(edits.profile("use_context"), at_least=0.5),
        "prompt positions": edit(edits.profile("use_context"), prompt="first"),
    }
    for reason, each in refused.items():
        with pytest.raises(EngineLoadError, match=reason):
            runner.load_edit(each)
        with pytest.raises(EngineError, match="not resident"):
            runner.answer([Row(PROMPTS[0], edit=each)], 1)
    assert not runner.engine.dead
    assert_same(runner.answer([Row(PROMPTS[0], edit=made["last"])], COUNT)[0], expected["last", PROMPTS[0]])


LATENTS_TOO_FAR = 64


def test_an_unloaded_edit_is_gone_and_comes_back(runner: Runner, made, expected):
    runner.unload_edit(made["both"])
    with pytest.raises(EngineError, match="not resident"):
        runner.answer([Row(PROMPTS[0], edit=made["both"])], 1)
    runner.load_edit(made["both"])
    assert_same(runner.answer([Row(PROMPTS[0], edit=made["both"])], COUNT)[0], expected["both", PROMPTS[0]])


# Cut into chunks, thrown out and computed again


def test_chunked_and_preempted_rows_keep_their_edits(chunked_engine: Runner, edits: Edits, made, oracle: Oracle):
    """Sixteen rows that grow into a second block each, in chunks of 48 tokens."""
    prompts = [tuple(range(start, start + 118)) for start in range(2000, 2800, 200)]
    guarded = edit(edits.profile("use_context"), generation="all", probe=edits.probe(), at_least=0.5)
    probe = Profile.open(Path(edits.probe()["path"])).probe
    chosen = {name: made[name] for name in ("last", "everywhere")} | {"guarded": guarded}
    rows = [Row(prompt, edit=each) for prompt in prompts for each in (None, *chosen.values())]
    before = chunked_engine.preemptions
    for each in chosen.values():
        chunked_engine.load_edit(each)
    together = chunked_engine.answer(rows, 24)
    assert chunked_engine.preemptions > before
    for row, answer in zip(rows, together, strict=True):
        if row.edit is guarded:
            score = float(probe.score(oracle.stream(row.prompt, PROBE_LAYER)[-1:]))
            assert answer.report.score == pytest.approx(score, abs=1e-4)
            row = Row(row.prompt, edit=guarded if score >= 0.5 else None)
            assert answer.report.applied is (score >= 0.5)
        assert_same(answer, oracle.answer(row.prompt, row.edit, 24))
        assert_report(row, answer)


def test_the_oracle_edits_the_stream_that_vllm_calls_hidden_plus_residual(oracle: Oracle):
    """transformers' layer output is the whole stream: the last one, normalised, gives the logits."""
    h = oracle.stream(PROMPTS[0], 2)
    logits = oracle.model.lm_head(oracle.model.model.norm(h))
    assert torch.allclose(logits, oracle.model(torch.tensor([PROMPTS[0]])).logits[0], atol=1e-5)
