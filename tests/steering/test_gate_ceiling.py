"""A draft is stopped only where no continuation could change the decision."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering.gate.cascade import score_of
from steering.gate.ceiling import ceiling
from steering.gate.policy import Policy
from steering.gate.signals import FEATURES, SCALES, Draft
from steering.toolgate import Decision, NeedProbe, advance, start
from tests.steering.gate_world import asking, policy, stage

QUESTION = "What is 12345 + 67890?"
MOST = 6
WORDS = st.sampled_from(["I", " do not", " know", ".", " don't", "t", " 42", " not sure", " Paris", " unable to", "x"])
TOKEN = st.tuples(WORDS, st.floats(-12, 0), st.lists(st.floats(-12, -0.7), max_size=4))


def weighed(weights: tuple[float, ...], bias: float, tau: float, scaled: bool = False, **changes: Any) -> Policy:
    """One stage of all features of a draft, as they are or on the scales that a fit gives them."""
    scales = [SCALES.get(name, "linear") if scaled else "linear" for name in FEATURES["draft"]]
    names = zip(FEATURES["draft"], scales, strict=True)
    features = [{"name": name, "mean": 0.5, "std": 2.0, "scale": scale} for name, scale in names]
    one = {**stage("draft", lo=min(0.1, tau), hi=max(0.9, tau)), "features": features}
    one["logistic"] = {"weights": list(weights), "bias": bias}
    probes = {"order": ["draft"], "max_tokens": MOST, "timeout_ms": 1000}
    return policy(**{"stages": [one], "probes": probes, "thresholds": {"suppress": tau}, **changes})


def begun(tokens: list[tuple[str, float, list[float]]], count: int) -> Draft:
    """The first `count` tokens; the whole draft is finished."""
    some = tokens[:count]
    text, finished = "".join(word for word, _, _ in some), count == len(tokens)
    tops = tuple((logprob, *others) for _, logprob, others in some)
    return Draft(text, tuple(logprob for _, logprob, _ in some), tops, finished, stopped=not finished)


def need_of(made: Policy, **request: Any) -> NeedProbe:
    need = start(made, asking(QUESTION, **request))
    assert isinstance(need, NeedProbe)
    return need


def decided(need: NeedProbe, draft: Draft) -> Decision:
    found = advance(need, draft, 1.0)
    assert isinstance(found, Decision)
    return found


@given(
    st.tuples(*[st.floats(-3, 3)] * len(FEATURES["draft"])),
    st.floats(-3, 3),
    st.floats(0.05, 0.95),
    st.lists(TOKEN, min_size=1, max_size=MOST),
    st.booleans(),
)
def test_a_stopped_draft_decides_as_the_whole_one(
    weights: tuple[float, ...], bias: float, tau: float, tokens: list[tuple[str, float, list[float]]], scaled: bool
) -> None:
    made = weighed(weights, bias, tau, scaled)
    need, whole = need_of(made), begun(tokens, len(tokens))
    score = score_of(made.stages[0], whole.features())
    for count in range(1, len(tokens)):
        first = begun(tokens, count)
        highest = ceiling(made.stages[0], {}, first, MOST)
        assert highest >= score - 1e-9
        assert need.settles(first) == (highest < tau)
        if need.settles(first):
            told = decided(need, first)
            assert (told.action, decided(need, whole).action) == ("allow", "allow")
            assert told.stopped
            assert told.score is not None
            assert told.score < tau


@pytest.mark.parametrize(
    ("weights", "settles"),
    [
        ((0.0, 0.0, 0.0, 0.0, -9.0, 0.0), (False, False, False, True)),  # "do not" may still become "do nothing"
        ((0.0, 9.0, 0.0, 0.0, 0.0, 0.0), (False, True, True, True)),  # the second token is a guess
        ((0.0, 0.0, -9.0, 0.0, 0.0, 0.0), (False, True, True, True)),
        ((9.0, 0.0, 0.0, 0.0, 0.0, 0.0), (False, True, True, True)),  # even if all that follows is certain
        ((-9.0, 0.0, 0.0, 0.0, 0.0, 0.0), (False, False, False, False)),  # nothing bounds a mean from below
        ((0.0, 0.0, 0.0, 9.0, 0.0, 0.0), (False, False, False, False)),  # it may get longer
        ((0.0, 0.0, 0.0, -9.0, 0.0, 0.0), (False, True, True, True)),  # it is too long already
    ],
)
def test_each_feature_settles_what_it_can(weights: tuple[float, ...], settles: tuple[bool, ...]) -> None:
    doubt = [-2.0] * 4
    tokens = [("I", -0.01, []), (" do", -6.0, doubt), (" not", -0.01, []), (" know", -0.01, []), (".", -0.01, [])]
    at_first = ceiling(weighed(weights, 0.0, 0.5).stages[0], {}, begun(tokens, 1), MOST)
    bias = -math.log(at_first / (1 - at_first)) + 0.2 if 0 < at_first < 1 else 0.0  # one token leaves it just open
    need = need_of(weighed(weights, bias, 0.5))
    assert tuple(need.settles(begun(tokens, count)) for count in (1, 2, 3, 4)) == settles


def test_what_hangs_on_more_than_the_draft_is_written_out() -> None:
    weights = (0.0, 9.0, 0.0, 0.0, 0.0, 0.0)
    guess = Draft("80235", (-4.0,), ((-4.0,),), False, stopped=True)
    made = weighed(weights, 0.0, 0.9)
    assert need_of(made).settles(guess)
    assert not need_of(made).settles(replace(guess, logprobs=()))
    require = {"suppress": 0.9, "require": 0.2}
    assert need_of(weighed(weights, 0.0, 0.9, thresholds=require)).settles(guess)
    assert not need_of(weighed(weights, 0.0, 0.9, thresholds=require), allow_require=True).settles(guess)
    (drafted,) = made.model_dump(mode="json")["stages"]
    last = stage("ptrue", 1, 0)
    probes = {"order": ["draft", "ptrue"], "max_tokens": MOST, "timeout_ms": 1000}
    assert not need_of(policy(stages=[last], probes=probes)).settles(guess)  # P(True) asks about the whole draft
    for low, stops in ((0.0, False), (0.9, True)):  # a later stage may raise what lies inside the band
        staged = [{**drafted, "lo": low, "hi": 0.95}, last]
        need = need_of(policy(stages=staged, probes=probes, thresholds={"suppress": 0.9}))
        assert need.settles(guess) == stops
