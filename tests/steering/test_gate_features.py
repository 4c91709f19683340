"""Features of requests and of probes; answers that count as the same."""

import math

import pytest

from steering.gate.answers import as_number, cluster_key, final_answer, right
from steering.gate.features import STATIC_FEATURES, static_features
from steering.gate.signals import FEATURES, Draft, Hidden, Peek, PTrue, Samples, call_mass, ptrue_messages, yes_and_no
from tests.steering.gate_world import called, tool


def of(text: str) -> dict[str, float]:
    return static_features([{"role": "user", "content": text}], [], {}, ())


def test_every_feature_is_always_there_and_finite() -> None:
    for messages in ([], [{"role": "user"}], [{"role": "user", "content": "x" * 100_000 + " 1" * 50_000}], [{}]):
        found = static_features(messages, [{}], {}, ())
        assert tuple(found) == STATIC_FEATURES
        assert all(map(math.isfinite, found.values()))


@pytest.mark.parametrize(
    ("name", "yes", "no"),
    [
        ("text.recency", "What is the weather today?", "Who wrote Hamlet?"),
        ("text.recency", "the latest score", "the underscore"),
        ("text.asks_tool", "Use the calculator for this", "What is a calculator?"),
        ("text.asks_tool", "Please look it up", "Look, up there"),
        ("text.asks_compute", "How many legs have 7 spiders?", "Where is Rome?"),
        ("text.asks_fact", "Where is Rome?", "Write a poem"),
        ("text.asks_reason", "Explain why", "2 + 2"),
        ("text.personal", "What is in my inbox?", "Who am I?"),
        ("text.code", "```x = 1```", "x = 1"),
        ("text.maths", "Solve $x^2 = 2$", "It costs $5"),
        ("text.has_year", "the 2024 election", "room 120245"),
        ("text.question_mark", "why?", "why"),
        ("text.url", "read https://example.org", "read example"),
    ],
)
def test_flags(name: str, yes: str, no: str) -> None:
    assert (of(yes)[name], of(no)[name]) == (1.0, 0.0)


def test_counts() -> None:
    found = of("What is 12,345 + (67 * 3) in Rome?")
    assert found["text.numbers"] == pytest.approx(math.log1p(3))
    assert found["text.digits"] == pytest.approx(math.log1p(8))
    assert found["text.longest_number"] == 5
    assert found["text.operators"] == pytest.approx(math.log1p(2))
    assert found["text.names"] == pytest.approx(math.log1p(1))
    assert of("in 1969 and 2035")["text.decades_since_2000"] == pytest.approx(3.5)


def test_tool_features() -> None:
    messages = [{"role": "user", "content": "search the population of Rome"}]
    tools = [
        tool("search", "Find the population and area of cities"),
        tool("calc"),
        tool("mail", "search population Rome"),
    ]
    kinds = {"search": "lookup", "calc": "compute", "mail": "action"}
    found = static_features(messages, tools, kinds, {"search", "calc"})
    assert found["tools.count"] == pytest.approx(math.log1p(3))
    assert found["tools.gateable"] == pytest.approx(math.log1p(2))
    assert found["tools.action"] == found["tools.lookup"] == pytest.approx(math.log1p(1))
    assert found["tools.overlap"] == pytest.approx(2 / 3)  # search, population; not Rome, which only a mail tool names
    assert found["tools.named"] == 1


def test_loop_features() -> None:
    messages = [{"role": "user", "content": "a"}, *called(("f", "{}"), ("f", "{ }"))]
    found = static_features(messages, [], {}, ())
    assert (found["loop.repeated"], found["loop.since_user"]) == (1, 1)
    assert found["loop.calls_used"] == found["loop.results"] == pytest.approx(math.log1p(2))
    later = static_features([*messages, {"role": "user", "content": "b"}], [], {}, ())
    assert (later["loop.since_user"], later["loop.user_turns"]) == (0, pytest.approx(math.log1p(2)))


def test_draft_features() -> None:
    tops = ((math.log(0.5), math.log(0.25)), (math.log(0.9),))
    found = Draft("I'm sorry, I cannot", (math.log(0.5), math.log(0.9)), tops, finished=False).features()
    assert found["draft.mean_logprob"] == pytest.approx((math.log(0.5) + math.log(0.9)) / 2)
    assert found["draft.min_prob"] == pytest.approx(0.5)
    assert found["draft.max_entropy"] == pytest.approx(0.5 * math.log(2) + 2 * 0.25 * math.log(4))
    assert (found["draft.refusal"], found["draft.finished"]) == (1, 0)
    empty = Draft("", (), (), finished=True).features()
    assert (empty["draft.tokens"], empty["draft.min_prob"], empty["draft.refusal"]) == (0, 1, 0)


def test_samples_cluster_by_answer() -> None:
    found = Samples(("The answer is 42.", "42", "#### 42.0", "Paris", "the paris!")).features()
    assert found["samples.top_share"] == pytest.approx(0.6)
    assert found["samples.clusters"] == 2
    assert found["samples.entropy"] == pytest.approx(-(0.6 * math.log(0.6) + 0.4 * math.log(0.4)))
    assert Samples(("a", "a")).features()["samples.entropy"] == 0


def test_the_other_probes() -> None:
    assert PTrue(0.3, 0.1).features() == {"ptrue.p_true": pytest.approx(0.75)}
    assert PTrue(0.0, 0.0).features() == {"ptrue.p_true": 0.5}
    assert Peek(0.4).features() == {"peek.p_call": 0.4}
    assert Hidden(0.4).features() == {"hidden.score": 0.4}
    assert yes_and_no([(" Yes", math.log(0.5)), ("yes", math.log(0.1)), ("No", math.log(0.2)), ("Not", 0.0)]) == (
        pytest.approx(0.6),
        pytest.approx(0.2),
    )
    top = [("<tool_call>", math.log(0.3)), ("<", math.log(0.2)), ("<b", math.log(0.4)), (" ", math.log(0.1))]
    assert call_mass(top, "<tool_call>") == pytest.approx(0.5)
    assert [one["role"] for one in ptrue_messages([{"role": "user", "content": "q"}], "d")] == [
        *("user", "assistant", "user")
    ]


def test_the_probes_make_the_features_that_policies_may_name() -> None:
    made = (Peek(0.1), Draft("a", (-0.1,), ((-0.1,),), True), Samples(("a",)), PTrue(0.1, 0.2), Hidden(0.1))
    for signal, names in zip(made, list(FEATURES.values())[1:], strict=True):
        assert tuple(signal.features()) == names


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 42.", "42"),
        ("First answer: 3\nno, the answer is **Paris**.\nBye", "Paris"),
        ("steps\n#### 1,234", "1,234"),
        ("so \\boxed{7} it is", "7"),
        ("Paris", "Paris"),
        ('{"a": 1}', '{"a": 1}'),
        ("the answer is", "the answer is"),
    ],
)
def test_the_answer_in_a_text(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_what_is_right() -> None:
    assert right("The answer is 42 apples on 2 trees", ["42"])
    assert right("7 times 6 is 42", ["42.0"])
    assert right("It costs $1,234.50", ["1234.5"])
    assert right("the  PARIS!", ["Paris"])
    assert right("-5", ["−5"])
    assert right("1e3", ["1000"])
    assert not right("42 or 43", ["42"])
    assert not right("Paris, Texas", ["Paris"])
    assert not right("", ["", "0"])
    assert not right("the", ["a"])
    assert not right("12345678901234567890123456789012", ["12345678901234567890123456789013"])
    assert right("yes", ["no", "yes"])


def test_numbers() -> None:
    assert as_number(" €1,000 ") == 1000
    assert as_number("50%") == 50
    assert as_number("1,00") is None
    assert as_number("3 apples") is None
    big = "12345678901234567890123456789012"
    assert cluster_key(big) != cluster_key(big[:-1] + "3")
    assert cluster_key("1e3") == cluster_key("1,000.00")
