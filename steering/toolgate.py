"""The tool gate: does this request need its tools? A state machine without I/O; the server runs the probes.

    step = start(policy, request)
    while isinstance(step, NeedProbe):
        step = advance(step, <a Signal of step.probe, or Failed>, elapsed_ms)
    # step is a Decision; `rewrite` makes the tools and tool_choice of it

The gate is fail-open: whatever goes wrong, the request stays as it is. It never touches what the caller forced, and withholds
only tools that look up or compute what the model may know. Tools that ask the user, read the user's state or act always pass
(SMART's AskUser calls rise where they are needed; When2Call: a direct answer is wrong where live data are asked for).

In a tool loop (tool results after the last user message) only the budget and repeat rules apply: the scores were calibrated
on questions, not on loops.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from steering.gate.cascade import Cascade, Verdict, Walk, begin, observe
from steering.gate.ceiling import settled
from steering.gate.dialogue import (
    Call,
    Dict,
    allowed_names,
    calls_in,
    choice_of,
    in_tool_loop,
    proposed,
    since_user,
    tool_name,
)
from steering.gate.features import GATEABLE, KINDS, static_features
from steering.gate.policy import Policy, ProbeSettings, mismatch
from steering.gate.rules import Budget, repeated_tools, spent_tools
from steering.gate.signals import PROBE_OF, Draft, Probe, Signal

Action = Literal["allow", "suppress", "narrow", "require"]
Reason = Literal[
    "confident_without_tool",
    "budget_exhausted",
    "repeated_call",
    "likely_underuse",
    "uncertain",
    "needs_tool",
    "not_gateable",
    "caller_forced",
    "gate_error",
    "policy_mismatch",
    "explored",
    "off",
    "no_policy",
    "timeout",
]


@dataclass(frozen=True)
class Served:
    """What serves the request; a policy holds only for what it was fitted on."""

    base_fingerprint: str
    delta_digest: str | None
    template_sha256: str


@dataclass(frozen=True)
class GateRequest:
    """A chat request as the gate sees it.

    `explore_u` is a uniform random number in [0, 1). `marks` are kinds of tools by name, as the request itself states them;
    they go before the policy's. `budget` is the caller's limit of gateable calls per question. `tool_calls` are those of an
    answer that is to be checked before it is sent (placement post); None before generating.
    """

    messages: Sequence[Dict]
    tools: Sequence[Dict]
    served: Served
    explore_u: float
    tool_choice: Any = None
    off: bool = False
    allow_require: bool = False
    budget: int | None = None
    marks: Mapping[str, str] = field(default_factory=dict)
    tool_calls: Sequence[Dict] | None = None


@dataclass(frozen=True)
class Decision:
    """What to do, and everything that it came from.

    `propensity`: the probability of this outcome given the request, for weighting logged rows. `draft`: with suppress mode
    answer_from_draft the whole answer, where the draft was finished. `stopped`: score and signals are of a draft that was left
    when it could not reach the threshold any more. `problem` says more than `reason` for the log.
    """

    action: Action
    reason: Reason
    policy_id: str | None = None
    tools_removed: tuple[str, ...] = ()
    score: float | None = None
    threshold: float | None = None
    stage: str | None = None
    signals: Mapping[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    propensity: float = 1.0
    budget: Budget | None = None
    draft: str | None = None
    stopped: bool = False
    problem: str | None = None

    @property
    def explored(self) -> bool:
        return self.reason == "explored"


@dataclass(frozen=True)
class State:
    """What is known while probes run. `usage` counts (prompt, completion) tokens of the probes so far."""

    policy: Policy
    request: GateRequest
    names: tuple[str, ...]
    gateable: tuple[str, ...]
    walk: Walk
    usage: tuple[int, int] = (0, 0)
    draft: Draft | None = None
    budget: Budget | None = None


@dataclass(frozen=True)
class NeedProbe:
    """Run this probe (gate/signals.py says how each is asked) within `timeout_ms`, and `advance`."""

    probe: Probe
    settings: ProbeSettings
    timeout_ms: int
    state: State

    @property
    def draft(self) -> str:
        """The text that ptrue asks about; empty before a draft."""
        return self.state.draft.text if self.state.draft else ""

    def settles(self, first: Draft) -> bool:
        """Whether the first tokens of a draft settle that the tools stay; the rest need not be written.

        Never where a low score would require a call: then how low it is counts.
        """
        policy = self.state.policy
        if self.state.request.allow_require and policy.thresholds.require is not None:
            return False
        return settled(Cascade.of(policy), self.state.walk, first)


@dataclass(frozen=True)
class Failed:
    """A probe that gave no signal."""

    reason: Literal["timeout", "gate_error"]
    problem: str


Step = Decision | NeedProbe


def start(policy: Policy | None, request: GateRequest) -> Step:
    """The first step of a request. Raises nothing on a request that the server has checked."""
    if request.off:
        return Decision("allow", "off")
    if choice_of(request.tool_choice) == "forced":
        return Decision("allow", "caller_forced", policy.policy_id if policy else None)
    if policy is None:
        return Decision("allow", "no_policy")
    served = request.served
    reason = mismatch(policy, served.base_fingerprint, served.delta_digest, served.template_sha256)
    if reason is not None:
        return Decision("allow", "policy_mismatch", policy.policy_id, problem=reason)
    names = _in_play(request)
    kinds = {name: _kind(policy, request, name) for name in names}
    gateable = tuple(name for name in names if kinds[name][1])
    asked = None if request.tool_calls is None else tuple(call for _, call in proposed(request.tool_calls))
    if not gateable or (asked is not None and not any(call.name in gateable for call in asked)):
        return Decision("allow", "not_gateable", policy.policy_id)
    by_rule, budget = _rules(policy, request, names, {name: kinds[name][0] for name in gateable}, asked)
    if by_rule is not None:
        return by_rule
    if policy.mixed == "allow" and len(gateable) < len(names):
        return Decision("allow", "not_gateable", policy.policy_id, budget=budget)
    if in_tool_loop(request.messages) or not _can_act(policy, request):
        tau = policy.thresholds.suppress
        return Decision("allow", "uncertain", policy.policy_id, threshold=tau, budget=budget)
    static = static_features(request.messages, request.tools, {n: k for n, (k, _) in kinds.items()}, gateable)
    state = State(policy, request, names, gateable, Walk(static), budget=budget)
    return _step(state, begin(Cascade.of(policy), static), 0.0)


def advance(need: NeedProbe, outcome: Signal | Failed, elapsed_ms: float) -> Step:
    """The step after a probe. `elapsed_ms` is the time since `start`."""
    state = need.state
    if isinstance(outcome, Failed):
        return _allowed(state, outcome.reason, outcome.problem)
    state = replace(
        state,
        usage=(state.usage[0] + outcome.prompt_tokens, state.usage[1] + outcome.completion_tokens),
        draft=outcome if isinstance(outcome, Draft) else state.draft,
    )
    if PROBE_OF[type(outcome)] != need.probe:
        return _allowed(state, "gate_error", f"{need.probe} was to be asked, {PROBE_OF[type(outcome)]} came back")
    try:
        features = outcome.features()
    except (ValueError, OverflowError) as error:
        return _allowed(state, "gate_error", f"{need.probe}: {error}")
    wrong = next((name for name, value in features.items() if not math.isfinite(value)), None)
    if wrong is not None:
        return _allowed(state, "gate_error", f"{wrong} is not finite")
    if elapsed_ms >= state.policy.probes.timeout_ms:
        return _allowed(state, "timeout", f"{elapsed_ms:.0f} ms after {need.probe}")
    cascade = Cascade.of(state.policy)
    return _step(state, observe(cascade, state.walk, features, outcome.completion_tokens), elapsed_ms)


def rewrite(
    decision: Decision, policy: Policy | None, tools: Sequence[Dict], tool_choice: Any
) -> tuple[list[Dict] | None, Any]:
    """The tools and tool_choice to generate with; (None, None) where no tool is left, which many servers insist on.

    A choice of `allowed_tools` in mode auto becomes a shorter list, whatever was decided.
    """
    allowed = allowed_names(tool_choice)
    shown = [tool for tool in tools if allowed is None or tool_name(tool) in allowed]
    choice = tool_choice if allowed is None else "auto"
    if decision.action == "require":
        return shown, "required"
    if decision.action == "suppress" and policy is not None and policy.suppress_mode == "tool_choice_none":
        return shown, "none"
    kept = [tool for tool in shown if tool_name(tool) not in decision.tools_removed]
    return (kept, choice) if kept else (None, None)


def _in_play(request: GateRequest) -> tuple[str, ...]:
    allowed = allowed_names(request.tool_choice)
    names = dict.fromkeys(map(tool_name, request.tools))
    return tuple(name for name in names if allowed is None or name in allowed)


def _kind(policy: Policy, request: GateRequest, name: str) -> tuple[str, bool]:
    mark = request.marks.get(name)
    if mark is None:
        return policy.kind_of(name)
    return (mark, mark in GATEABLE) if mark in KINDS else ("unknown", False)


def _can_act(policy: Policy, request: GateRequest) -> bool:
    """Whether any score could change the request; if none could, nothing is asked."""
    thresholds = policy.thresholds
    return thresholds.suppress is not None or (thresholds.require is not None and request.allow_require)


def _rules(
    policy: Policy,
    request: GateRequest,
    names: tuple[str, ...],
    kinds: Mapping[str, str],
    asked: tuple[Call, ...] | None,
) -> tuple[Decision | None, Budget | None]:
    """Budgets, then repeated calls; a rule decides alone, without a score. `kinds` holds the gateable tools in play."""
    calls = [call for call in calls_in(since_user(request.messages)) if call.name in kinds]
    spent, budget = spent_tools(calls, kinds, policy.budgets, request.budget)
    repeated = repeated_tools(calls, asked)
    if spent and (asked is None or any(call.name in spent for call in asked)):
        return _removing(policy, names, spent, "budget_exhausted", budget), budget
    return (_removing(policy, names, repeated, "repeated_call", budget) if repeated else None), budget


def _removing(
    policy: Policy, names: tuple[str, ...], tools: Collection[str], reason: Reason, budget: Budget | None
) -> Decision:
    removed = tuple(name for name in names if name in tools)
    return Decision(_withheld(names, removed), reason, policy.policy_id, removed, budget=budget)


def _withheld(names: tuple[str, ...], removed: tuple[str, ...]) -> Action:
    return "suppress" if len(removed) == len(names) else "narrow"


def _allowed(state: State, reason: Reason, problem: str | None = None) -> Decision:
    return Decision(
        "allow",
        reason,
        state.policy.policy_id,
        score=state.walk.score,
        threshold=state.policy.thresholds.suppress,
        stage=state.walk.stage,
        signals=state.walk.features,
        prompt_tokens=state.usage[0],
        completion_tokens=state.usage[1],
        budget=state.budget,
        stopped=state.draft is not None and state.draft.stopped,
        problem=problem,
    )


def _step(state: State, reached: Walk | Verdict, elapsed_ms: float) -> Step:
    if isinstance(reached, Verdict):
        return _explored(state, _decided(state, reached))
    state = replace(state, walk=reached)
    left = state.policy.probes.timeout_ms - elapsed_ms
    return NeedProbe(reached.pending[0], state.policy.probes, math.ceil(left), state)


def _decided(state: State, verdict: Verdict) -> Decision:
    policy, request = state.policy, state.request
    known = replace(state, walk=Walk(verdict.features, score=verdict.score, stage=verdict.stage))
    require = policy.thresholds.require
    if verdict.suppress:
        action = _withheld(state.names, state.gateable)
        draft = state.draft
        whole = policy.suppress_mode == "answer_from_draft" and action == "suppress" and draft and draft.finished
        return replace(
            _allowed(known, "confident_without_tool"),
            action=action,
            tools_removed=state.gateable,
            draft=draft.text if whole and draft else None,
        )
    if request.allow_require and require is not None and verdict.score is not None and verdict.score <= require:
        return replace(_allowed(known, "likely_underuse"), action="require")
    return _allowed(known, "needs_tool" if verdict.side == "below" else "uncertain")


def _explored(state: State, decision: Decision) -> Decision:
    """Let a share of the requests pass that a score would change, so that live rows tell what tools would have done."""
    explore = state.policy.explore
    if decision.action == "allow":
        return decision
    if state.request.explore_u < explore:
        return replace(decision, action="allow", reason="explored", tools_removed=(), draft=None, propensity=explore)
    return replace(decision, propensity=1 - explore)
