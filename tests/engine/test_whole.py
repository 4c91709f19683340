"""Whole fine-tunes, every parameter trained: served equals merged, in one batch with the base and a projection delta."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressors.artifact import Artifact
from compressors.peft import import_lora
from server.core import Sampling
from server.engine.base import EngineDelta
from tests.compressors.lora_folder import pair, write_lora
from tests.engine.bed import Row
from tests.engine.conftest import World, train, train_delta
from tests.engine.test_truths import PROMPTS, assert_same, merged, oracle

pytestmark = pytest.mark.engine


def test_every_kind_of_parameter_is_in_the_delta(world: World):
    with Artifact.open(Path(world.whole.path)) as artifact:
        kinds = {name: record.kind for name, record in artifact.records.items() if record.tied_to is None}
    assert kinds["model.embed_tokens.weight"] == "rows"
    assert kinds["model.norm.weight"] == "raw"
    assert all(kind != "zero" for kind in kinds.values())


def test_two_whole_fine_tunes_do_not_mix(world: World, tmp_path: Path):
    """Slots of the norms and tables of the vocabulary belong to one delta each."""
    other = train_delta(world.base, train(world.base, tmp_path / "other", 0.03, 3), tmp_path / "o.safetensors", "d")
    world.runner.load(other)
    try:
        rows = [Row(prompt, who) for prompt in PROMPTS for who in (other, None, world.whole)]
        answers = world.runner.answer(rows, 12)
    finally:
        world.runner.unload(other)
    models = {who: merged(world.base, who) for who in (other, None, world.whole)}
    for row, answer in zip(rows, answers, strict=True):
        assert_same(answer, oracle(models[row.delta], row.prompt, 12))


@pytest.mark.parametrize("order", ["forward", "reversed"])
def test_served_equals_merged_beside_the_base_and_a_projection_delta(world: World, order: str):
    rows = [Row(prompt, who) for prompt in PROMPTS for who in (None, world.whole, world.projections)]
    rows = rows if order == "forward" else rows[::-1]
    answers = dict(zip(rows, world.runner.answer(rows, 16), strict=True))
    for who in (None, world.whole, world.projections):
        model = merged(world.base, who)
        for row in rows:
            if row.delta == who:
                assert_same(answers[row], oracle(model, row.prompt, 16))
    for prompt in PROMPTS:
        assert len({answers[row].tokens for row in rows if row.prompt == prompt}) == 3


def test_alone_equals_merged(world: World):
    model = merged(world.base, world.whole)
    row = Row((*PROMPTS[1], 5), world.whole)
    assert_same(world.runner.answer([row], 16)[0], oracle(model, row.prompt, 16))


def test_base_rows_are_bit_identical_beside_a_whole_fine_tune_and_without(world: World):
    rows = [Row((*prompt, 1)) for prompt in PROMPTS]
    beside = world.runner.answer([*rows, Row((*PROMPTS[0], 1), world.whole)])[: len(rows)]
    again = world.runner.answer([*(Row(row.prompt, cache_salt="x") for row in rows), Row((*PROMPTS[0], 1), None, "y")])
    world.runner.unload(world.whole)
    try:
        without = world.runner.answer(
            [*(Row(row.prompt, cache_salt="w") for row in rows), Row((*PROMPTS[0], 1), None, "v")]
        )
    finally:
        assert world.runner.load(world.whole) > 0
    for found in (again, without):
        assert [(a.tokens, a.logprobs) for a in beside] == [(a.tokens, a.logprobs) for a in found[: len(rows)]]


def test_a_fine_tunes_end_tokens_end_its_answers_and_no_others(world: World):
    prompt = (*PROMPTS[0], 9)
    tokens = world.runner.answer([Row(prompt, world.whole)], 8)[0].tokens
    stopping = replace(world.whole, stop_ids=(tokens[2],))
    sampling = Sampling(max_tokens=8, temperature=0.0, logprobs=0)
    ended = world.runner.sampled(Row(prompt, stopping), sampling)[0]
    assert ended.tokens == tokens[: tokens.index(tokens[2]) + 1]
    assert world.runner.sampled(Row(prompt, world.whole), sampling)[0].tokens == tokens


def test_an_imported_lora_serves_as_peft_would(world: World, tmp_path: Path):
    """Ranks below and above the matrix, rank-stabilised, every target module of the model."""
    model = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    weights, tensors = dict(model.named_parameters()), {}
    for i, (name, weight) in enumerate(list(weights.items())):
        if "_proj.weight" in name:
            module, rank = name.removesuffix(".weight"), 80 if "k_proj" in name else 8
            a, b = pair(tuple(weight.shape), rank, i, scale=0.02 * (80 / rank) ** 0.5)
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            with torch.no_grad():
                weight += 16 / rank**0.5 * (b @ a)
    folder = write_lora(tmp_path / "lora", tensors, r=8, lora_alpha=16, use_rslora=True, rank_pattern={"k_proj": 80})
    import_lora(folder, world.base, tmp_path / "lora.safetensors")
    lora = EngineDelta(digest="c" * 64, path=str(tmp_path / "lora.safetensors"))
    world.runner.load(lora)
    try:
        rows = [Row(prompt, who) for prompt in PROMPTS for who in (lora, None, world.whole)]
        answers = world.runner.answer(rows, 16)
    finally:
        world.runner.unload(lora)
    plain = merged(world.base, None)
    for row, answer in zip(rows, answers, strict=True):
        if row.delta == lora:
            assert_same(answer, oracle(model, row.prompt, 16))
            assert answer.tokens != oracle(plain, row.prompt, 16).tokens
