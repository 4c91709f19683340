"""The gate's decision, step by step."""

from dataclasses import replace
from typing import Any

import pytest

from steering.gate.signals import Draft, Hidden, PTrue, Samples
from steering.toolgate import Decision, Failed, GateRequest, NeedProbe, Served, Step, advance, rewrite, start
from tests.steering.gate_world import SERVED, asking, called, policy, stage, tool

HARD = "What is 12345 + 67890?"  # ten digits: static score 0.40, inside its band
EASY = "Who wrote it?"  # no digit: 0.88
ONE_STAGE: dict[str, Any] = {"stages": [stage("static", -1, 2, 0.1, 0.9)], "probes": {}}


def draft(logprob: float = -0.01, finished: bool = True, text: str = "80235") -> Draft:
    return Draft(text, (logprob,) * 4, ((logprob,),) * 4, finished, prompt_tokens=20)


def decided(step: Step) -> Decision:
    assert isinstance(step, Decision)
    return step


def asked(step: Step) -> NeedProbe:
    assert isinstance(step, NeedProbe)
    return step


def test_a_confident_draft_withholds_the_tools() -> None:
    need = asked(start(policy(), asking(HARD)))
    assert (need.probe, need.settings.max_tokens, need.timeout_ms) == ("draft", 8, 1000)
    found = decided(advance(need, draft(), 120.0))
    assert (found.action, found.reason, found.stage) == ("suppress", "confident_without_tool", "draft")
    assert found.tools_removed == ("calculator",)
    assert found.score == pytest.approx(0.948, abs=1e-3)
    assert found.threshold == 0.8
    assert (found.prompt_tokens, found.completion_tokens, found.propensity) == (20, 4, 1.0)
    assert found.signals["draft.mean_logprob"] == pytest.approx(-0.01)
    assert found.policy_id == policy().policy_id


def test_an_unsure_draft_leaves_them() -> None:
    need = asked(start(policy(), asking(HARD)))
    for logprob, reason in ((-0.3, "uncertain"), (-2.0, "needs_tool")):
        found = decided(advance(need, draft(logprob), 1.0))
        assert (found.action, found.reason, found.tools_removed) == ("allow", reason, ())


def test_a_score_outside_its_band_asks_nothing() -> None:
    sure = policy(stages=[stage("static", -1, 4, 0.1, 0.9), stage("draft", hi=0.99)])
    found = decided(start(sure, asking(EASY)))
    assert (found.action, found.stage, found.completion_tokens) == ("suppress", "static", 0)
    hopeless = policy(stages=[stage("static", -4, 1, 0.1, 0.9), stage("draft", hi=0.99)])
    found = decided(start(hopeless, asking(HARD)))
    assert (found.action, found.reason, found.stage) == ("allow", "needs_tool", "static")


def test_probes_stop_where_the_next_ones_could_cost_too_much() -> None:
    probes = {"order": ["draft", "samples"], "k": 3, "max_tokens": 8, "timeout_ms": 1000}
    stages = [stage("static", -1, 2, 0.1, 0.9), stage("draft", 10, 3, 0.1, 0.99), stage("samples", 1, 9)]
    for most, ends in ((27, "draft"), (28, None), (7, "static")):
        step = start(policy(stages=stages, probes={**probes, "max_probe_tokens": most}), asking(HARD))
        if most >= 8:
            step = advance(asked(step), draft(), 1.0)  # 4 tokens; the samples can take 24
        assert (step.stage if isinstance(step, Decision) else None) == ends
    assert decided(step).reason == "uncertain"


def test_probes_without_a_stage_of_their_own_are_collected() -> None:
    made = policy(
        stages=[stage("static", -1, 2, 0.1, 0.9), stage("ptrue", 1, 2)],
        probes={"order": ["draft", "ptrue"], "max_tokens": 8, "max_probe_tokens": 9},
    )
    need = asked(advance(asked(start(made, asking(HARD))), draft(text="It is 80235."), 1.0))
    assert (need.probe, need.draft) == ("ptrue", "It is 80235.")
    found = decided(advance(need, PTrue(0.6, 0.2), 2.0))
    assert (found.action, found.stage) == ("suppress", "ptrue")
    assert found.signals["ptrue.p_true"] == pytest.approx(0.75)
    assert found.completion_tokens == 5
    tight = policy(
        stages=[stage("static", -1, 2, 0.1, 0.9), stage("ptrue", 1, 2)],
        probes={"order": ["draft", "ptrue"], "max_tokens": 8, "max_probe_tokens": 8},
    )
    assert decided(start(tight, asking(HARD))).stage == "static"  # both or none


def test_whatever_fails_leaves_the_request_as_it_is() -> None:
    need = asked(start(policy(), asking(HARD)))
    nan = float("nan")
    for outcome, elapsed_ms, reason in (
        (Failed("timeout", "no answer"), 1000.0, "timeout"),
        (Failed("gate_error", "engine"), 3.0, "gate_error"),
        (draft(), 1000.0, "timeout"),
        (draft(nan), 1.0, "gate_error"),
        (draft(float("-inf")), 1.0, "gate_error"),
        (draft(float("inf")), 1.0, "gate_error"),
        (Hidden(0.9), 1.0, "gate_error"),
    ):
        found = decided(advance(need, outcome, elapsed_ms))
        assert (found.action, found.reason, found.tools_removed) == ("allow", reason, ())
        assert found.problem
    samples = policy(stages=[stage("static", -1, 2, 0.1, 0.9), stage("samples")], probes={"order": ["samples"]})
    assert decided(advance(asked(start(samples, asking(HARD))), Samples(()), 1.0)).reason == "gate_error"
    late = asked(advance(asked(start(_three(), asking(HARD))), draft(), 400.5))
    assert late.timeout_ms == 600


def _three() -> Any:
    stages = [stage("static", -1, 2, 0.1, 0.9), stage("draft", 10, 3, 0.1, 0.99), stage("samples", 1, 9)]
    return policy(stages=stages, probes={"order": ["draft", "samples"], "timeout_ms": 1000})


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        "none",
        {"type": "function", "function": {"name": "calculator"}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [tool("calculator")]}},
        {"type": "something_new"},
        7,
    ],
)
def test_a_forced_choice_is_never_touched(choice: Any) -> None:
    made = policy(**ONE_STAGE, budgets={"compute": 0})
    request = asking(EASY, tool_choice=choice, budget=0)
    found = decided(start(made, request))
    assert (found.action, found.reason) == ("allow", "caller_forced")
    assert rewrite(found, made, request.tools, choice) == (list(request.tools), choice)


def test_off_no_policy_and_another_model() -> None:
    assert decided(start(policy(), asking(off=True))).reason == "off"
    assert decided(start(None, asking())).reason == "no_policy"
    for served in (Served("x", None, "f" * 64), replace(SERVED, delta_digest="d"), replace(SERVED, template_sha256="")):
        found = decided(start(policy(), asking(served=served)))
        assert (found.action, found.reason) == ("allow", "policy_mismatch")
        assert found.problem is not None


def test_only_tools_that_look_up_or_compute_are_withheld() -> None:
    made = policy(**ONE_STAGE)
    for name in ("ask_user", "send_mail", "get_balance", "private_search"):
        assert decided(start(made, asking(EASY, name))).reason == "not_gateable"
    found = decided(start(made, asking(EASY, "send_mail", "search", "calculator", "ask_user")))
    assert (found.action, found.tools_removed) == ("narrow", ("search", "calculator"))
    assert decided(start(made, asking(EASY, "search", "calculator"))).action == "suppress"
    assert decided(start(made, GateRequest([], [], SERVED, 0.5))).reason == "not_gateable"


def test_a_policy_may_leave_mixed_requests_alone() -> None:
    """Scores do not act on them, rules do; requests of gateable tools alone are gated as ever."""
    made = policy(**ONE_STAGE, mixed="allow")
    found = decided(start(made, asking(EASY, "send_mail", "search")))
    assert (found.action, found.reason, found.tools_removed) == ("allow", "not_gateable", ())
    assert decided(start(made, asking(EASY, "search", "calculator"))).action == "suppress"
    marked = asking(EASY, "search", "wiki", marks={"wiki": "lookup"})
    assert decided(start(made, marked)).action == "suppress"
    spent = decided(start(made, asking(HARD, "search", "send_mail", budget=0)))
    assert (spent.action, spent.reason) == ("narrow", "budget_exhausted")
    probed = policy(mixed="allow")
    assert decided(start(probed, asking(HARD, "calculator", "send_mail"))).reason == "not_gateable"  # no probe is asked


def test_a_request_may_mark_its_tools() -> None:
    made = policy(**ONE_STAGE)
    found = decided(start(made, asking(EASY, "wiki", marks={"wiki": "lookup"})))
    assert found.tools_removed == ("wiki",)
    assert decided(start(made, asking(EASY, "search", marks={"search": "state"}))).reason == "not_gateable"
    assert decided(start(made, asking(EASY, "search", marks={"search": "nonsense"}))).reason == "not_gateable"


def test_allowed_tools_are_what_is_in_play() -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("search")]}}
    made = policy(**ONE_STAGE)
    request = asking(EASY, "search", "send_mail", tool_choice=choice)
    found = decided(start(made, request))
    assert (found.action, found.tools_removed) == ("suppress", ("search",))
    assert rewrite(found, made, request.tools, choice) == (None, None)
    assert rewrite(Decision("allow", "off"), made, request.tools, choice) == ([tool("search")], "auto")


def test_in_a_loop_only_budgets_and_repeats_count() -> None:
    made = policy(**ONE_STAGE, budgets={"compute": 2})
    user = {"role": "user", "content": EASY}
    one, other = ("calculator", '{"a": 1, "b": 2}'), ("calculator", '{"a": 3}')
    found = decided(start(made, asking(messages=[user, *called(one)])))
    assert (found.action, found.reason, found.score) == ("allow", "uncertain", None)
    found = decided(start(made, asking(messages=[user, *called(one, other)])))
    assert (found.action, found.reason, found.tools_removed) == ("suppress", "budget_exhausted", ("calculator",))
    assert found.budget is not None
    assert (found.budget.limit, found.budget.used) == (2, 2)
    free = policy(**ONE_STAGE)
    again = ("calculator", '{"b":2,   "a":1}')
    found = decided(start(free, asking(messages=[user, *called(one, again)])))
    assert (found.action, found.reason) == ("suppress", "repeated_call")
    assert decided(start(free, asking(messages=[user, *called(one, other)]))).action == "allow"
    assert decided(start(free, asking(messages=[user, *called(one, again, answered=False)]))).reason != "repeated_call"
    fresh = asking(messages=[user, *called(one, again), user])  # the user has spoken since
    assert decided(start(free, fresh)).reason == "confident_without_tool"


def test_budgets_are_per_kind_and_the_callers_is_over_all() -> None:
    user = {"role": "user", "content": HARD}
    made = policy(**ONE_STAGE, budgets={"lookup": 1})
    messages = [user, *called(("search", "{}"), ("send_mail", "{}"))]
    found = decided(start(made, asking(HARD, "search", "calculator", messages=messages)))
    assert (found.action, found.tools_removed) == ("narrow", ("search",))
    found = decided(start(made, asking(HARD, "search", "calculator", "send_mail", messages=messages, budget=1)))
    assert (found.action, found.tools_removed) == ("narrow", ("search", "calculator"))
    assert decided(start(made, asking(HARD, budget=0))).reason == "budget_exhausted"
    assert decided(start(made, asking(HARD, "send_mail", budget=0))).reason == "not_gateable"


def test_an_answer_is_checked_before_it_is_sent() -> None:
    made = policy(**ONE_STAGE, placement="post", budgets={"lookup": 1})
    user = {"role": "user", "content": EASY}
    (call,) = called(("calculator", '{"x": 1}'), answered=False)[0]["tool_calls"]
    (mail,) = called(("send_mail", "{}"), answered=False)[0]["tool_calls"]
    tools = ("calculator", "search", "send_mail")
    assert decided(start(made, asking(EASY, *tools, tool_calls=[mail]))).reason == "not_gateable"
    assert decided(start(made, asking(EASY, *tools, tool_calls=[]))).reason == "not_gateable"
    found = decided(start(made, asking(EASY, *tools, tool_calls=[mail, call])))
    assert (found.action, found.tools_removed) == ("narrow", ("calculator", "search"))
    loop = [user, *called(("calculator", '{"x":1}'))]
    found = decided(start(made, asking(EASY, *tools, messages=loop, tool_calls=[call])))
    assert (found.reason, found.tools_removed) == ("repeated_call", ("calculator",))
    spent = [user, *called(("search", "{}"))]
    assert decided(start(made, asking(EASY, *tools, messages=spent, tool_calls=[call]))).reason == "uncertain"


def test_exploring_lets_pass_and_reports_the_odds() -> None:
    made = policy(**ONE_STAGE, explore=0.25)
    found = decided(start(made, asking(EASY, explore_u=0.2)))
    assert (found.action, found.reason, found.explored, found.propensity) == ("allow", "explored", True, 0.25)
    assert found.tools_removed == ()
    assert found.score == pytest.approx(0.88, abs=1e-2)
    found = decided(start(made, asking(EASY, explore_u=0.25)))
    assert (found.action, found.propensity) == ("suppress", 0.75)
    found = decided(start(made, asking(HARD, explore_u=0.0)))
    assert (found.reason, found.propensity) == ("uncertain", 1.0)
    assert decided(start(made, asking(EASY, explore_u=0.0, budget=0))).reason == "budget_exhausted"


def test_a_call_is_required_only_if_policy_and_caller_agree() -> None:
    thresholds = {"suppress": 0.8, "require": 0.45}
    made = policy(**ONE_STAGE, thresholds=thresholds)
    found = decided(start(made, asking(HARD, allow_require=True)))
    assert (found.action, found.reason) == ("require", "likely_underuse")
    assert rewrite(found, made, [tool("calculator")], None) == ([tool("calculator")], "required")
    assert decided(start(made, asking(HARD))).action == "allow"
    assert decided(start(policy(**ONE_STAGE), asking(HARD, allow_require=True))).action == "allow"


def test_a_policy_that_can_do_nothing_asks_nothing() -> None:
    never = {"suppress": None}
    assert decided(start(policy(thresholds=never), asking(HARD))).reason == "uncertain"
    requiring = policy(thresholds={"suppress": None, "require": 0.5})
    assert decided(start(requiring, asking(HARD))).reason == "uncertain"
    found = decided(advance(asked(start(requiring, asking(HARD, allow_require=True))), draft(0.0), 1.0))
    assert (found.action, found.reason) == ("allow", "uncertain")  # certain of the answer, and still not withheld


def test_a_finished_draft_can_be_the_answer() -> None:
    made = policy(suppress_mode="answer_from_draft")
    need = asked(start(made, asking(HARD)))
    assert decided(advance(need, draft(), 1.0)).draft == "80235"
    assert decided(advance(need, draft(finished=False), 1.0)).draft is None
    assert decided(advance(need, draft(-0.3), 1.0)).draft is None
    mixed = asked(start(made, asking(HARD, "calculator", "send_mail")))
    assert decided(advance(mixed, draft(), 1.0)).draft is None
    assert decided(advance(asked(start(policy(), asking(HARD))), draft(), 1.0)).draft is None


def test_the_rewritten_request() -> None:
    tools = [tool("search"), tool("send_mail")]
    narrow = Decision("narrow", "confident_without_tool", tools_removed=("search",))
    both = Decision("suppress", "confident_without_tool", tools_removed=("search", "send_mail"))
    kept = policy(suppress_mode="tool_choice_none")
    assert rewrite(narrow, policy(), tools, "auto") == ([tool("send_mail")], "auto")
    assert rewrite(narrow, kept, tools, None) == ([tool("send_mail")], None)
    assert rewrite(both, policy(), tools, "auto") == (None, None)
    assert rewrite(both, kept, tools, "auto") == (tools, "none")
    assert rewrite(Decision("allow", "uncertain"), kept, tools, None) == (tools, None)


def test_messages_of_any_shape_are_read() -> None:
    made = policy(**ONE_STAGE)
    parts = [{"type": "text", "text": "Who"}, {"type": "image_url"}, {"type": "text", "text": "wrote it?"}]
    strange: list[dict[str, Any]] = [
        {"role": "system", "content": None},
        {"role": "assistant", "tool_calls": [{"id": 1}, "x", {"function": {"name": None}}]},
        {"role": "assistant", "tool_calls": "no"},
        {"role": "user", "content": parts},
    ]
    assert decided(start(made, asking(messages=strange))).reason == "confident_without_tool"
    odd = GateRequest(strange, [{"type": "web_search"}, {}, {"function": 3}], SERVED, 0.5)
    assert decided(start(made, odd)).reason == "not_gateable"
