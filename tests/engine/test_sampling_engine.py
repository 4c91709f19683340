"""Sampling fields on the real engine: each does what its name says."""

import asyncio
import json
import re
from contextlib import aclosing

import pytest

from server.core import Sampling, Structure
from server.engine.base import GrammarError, SamplingError
from tests.engine.bed import Row

pytestmark = pytest.mark.engine

PROMPT = tuple(range(1000, 1020))  # words: of a prompt that ends amid a letter, vLLM gives the end with the answer
SHAPE = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


def greedy(max_tokens=12, **fields):
    return Sampling(max_tokens, temperature=0.0, **fields)


def ids(engine, sampling, delta=None):
    return [token for event in engine.events(Row(PROMPT, delta), sampling) for token in event.token_ids]


def text(engine, **structure):
    sampling = greedy(64, structure=Structure(field="response_format", **structure))
    events = engine.events(Row(PROMPT), sampling)
    return "".join(event.text for event in events), events[-1].finish_reason


def test_logit_bias_forces_and_forbids(tiny_engine):
    plain = ids(tiny_engine, greedy(ignore_eos=True))
    assert ids(tiny_engine, greedy(4, ignore_eos=True, logit_bias=((777, 100.0),))) == [777] * 4
    assert ids(tiny_engine, greedy(1, ignore_eos=True, logit_bias=((plain[0], -100.0),))) != plain[:1]


def test_stop_tokens_end_the_answer_but_not_before_min_tokens(tiny_engine):
    plain = ids(tiny_engine, greedy(ignore_eos=True))
    assert len(set(plain)) > 1
    stop = next(token for token in plain if token != plain[0])
    events = tiny_engine.events(Row(PROMPT), greedy(ignore_eos=True, stop_token_ids=(stop,)))
    assert [token for event in events for token in event.token_ids] == plain[: plain.index(stop) + 1]
    assert events[-1].finish_reason == "stop"
    later = ids(tiny_engine, greedy(ignore_eos=True, stop_token_ids=(stop,), min_tokens=10))
    assert len(later) >= 10
    assert stop not in later[:9]


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 10.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}]
)
def test_penalties_change_what_is_repeated(tiny_engine, penalty):
    bias = ((777, 8.0), (778, 7.5))  # 777 again and again, where nothing is held against it
    assert set(ids(tiny_engine, greedy(6, ignore_eos=True, logit_bias=bias))) == {777}
    assert set(ids(tiny_engine, greedy(6, ignore_eos=True, logit_bias=bias, **penalty))) != {777}


def test_greedy_choices_are_the_greedy_answer(tiny_engine):
    alone = ids(tiny_engine, greedy(ignore_eos=True))
    choices = [[], []]
    for event in tiny_engine.events(Row(PROMPT), greedy(ignore_eos=True, n=2)):
        choices[event.index] += event.token_ids
    assert choices == [alone, alone]


def test_seeds_repeat(tiny_engine):
    def drawn(seed):
        return ids(tiny_engine, Sampling(12, seed=seed, ignore_eos=True))

    assert drawn(5) == drawn(5) != drawn(6)


def test_structures_hold(tiny_engine):
    answer, reason = text(tiny_engine, kind="json_schema", rule=json.dumps(SHAPE))
    assert (json.loads(answer).keys(), reason) == (SHAPE["properties"].keys(), "stop")
    answer, reason = text(tiny_engine, kind="regex", rule="[ab]{3}c")
    assert re.fullmatch("[ab]{3}c", answer)
    assert reason == "stop"
    assert text(tiny_engine, kind="choice", choices=("Delft", "Oslo (Norway)"))[0] in ("Delft", "Oslo (Norway)")
    assert re.fullmatch(r"(yes|no)!", text(tiny_engine, kind="grammar", rule='root ::= ("yes" | "no") "!"')[0])
    answer, reason = text(tiny_engine, kind="json_object")
    assert answer.startswith("{")
    assert reason == "length" or isinstance(json.loads(answer), dict)


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("regex", "(("),
        ("regex", "\x00"),
        ("regex", "(?<=a)b"),
        ("grammar", "root ::= missing"),
        ("grammar", "nonsense"),
        ("json_schema", '{"type": "string", "pattern": "(("}'),
    ],
)
def test_a_structure_without_a_grammar_is_refused(tiny_engine, kind, rule):
    with pytest.raises(GrammarError) as refused:
        text(tiny_engine, kind=kind, rule=rule)
    assert refused.value.param == "response_format"
    assert len(ids(tiny_engine, greedy(4, ignore_eos=True))) == 4  # the engine lives


@pytest.mark.parametrize("fields", [{"logit_bias": ((1 << 20, 1.0),)}, {"stop_token_ids": (1 << 20,)}])
def test_tokens_outside_the_vocabulary_are_refused(tiny_engine, fields):
    with pytest.raises(SamplingError) as refused:
        ids(tiny_engine, greedy(**fields))
    assert refused.value.param == next(iter(fields))


@pytest.mark.parametrize("with_delta", [False, True])
def test_a_prompt_scores_as_its_tokens_did_when_they_were_generated(tiny_engine, tiny_deltas, with_delta):
    delta = tiny_deltas[0] if with_delta else None
    events = tiny_engine.events(Row(PROMPT, delta), greedy(16, ignore_eos=True, logprobs=1))
    said = [token for event in events for token in event.logprobs]
    whole = (*PROMPT, *(token.token_id for token in said))
    for _ in range(2):  # the second time the prefix cache holds the prompt
        scored = tiny_engine.events(Row(whole, delta), greedy(1, logprobs=1, prompt_logprobs=1))
        prompt = scored[0].prompt_logprobs
        assert [token.token_id for token in prompt] == list(whole[1:])
        answer = prompt[len(PROMPT) - 1 :]
        assert [token.logprob for token in answer] == pytest.approx([token.logprob for token in said], abs=1e-4)
        assert [token.text for token in answer] == [token.text for token in said]
        assert all(token.top[0].token_id == token.token_id for token in answer)  # they were the likeliest


def test_the_urgent_row_goes_before_those_that_wait(tiny_engine):
    order = []

    async def row(name, priority, tokens):
        sampling = greedy(tokens, ignore_eos=True, priority=priority)
        stream = tiny_engine.engine.generate(f"{name}-row", PROMPT, sampling, None, None)
        async with aclosing(stream):
            async for _ in stream:
                if name not in order:
                    order.append(name)

    async def run():
        busy = [asyncio.create_task(row(f"busy{i}", 0, 48)) for i in range(16)]  # all of max_num_seqs
        while len(order) < 16:
            await asyncio.sleep(0.01)
        waiting = []
        for name, priority in (("late", 5), ("usual", 0), ("urgent", -5)):
            waiting.append(asyncio.create_task(row(name, priority, 1)))
            await asyncio.sleep(0.05)
        await asyncio.gather(*busy, *waiting)

    tiny_engine.loop.run_until_complete(run())
    assert order[16:] in (["urgent", "usual", "late"],)
