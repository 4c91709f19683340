"""The tool gate at work on one request: its probes are run, and its decision is carried out.

The decision itself is steering/toolgate.py's. The gate is fail-open: whatever goes wrong before the first token, the
request is answered as it came. Only a dead engine still fails.
"""

import logging
import random
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from server.admission import ServerOverloaded
from server.core import ChatPrompt, GatewayError, GenerationRequest, TokenEvent
from server.decisions import Decisions
from server.engine.base import EngineDeadError, EngineDelta, EngineError
from server.gate import Gate, GatePlan
from server.gate_answer import Ask, Events, calls_of, draft_as_answer, replayed, to_discard, without_calls
from server.gate_probes import Target
from server.prompt import message_dict, tool_dict
from steering.gate.policy import Policy
from steering.toolgate import Decision, GateRequest, NeedProbe, advance, start

# Reasons that no answer and no probe could change.
_SETTLED = ("off", "caller_forced", "policy_mismatch", "not_gateable", "gate_error")

log = logging.getLogger("deltaworks.gate")


class Gating:
    """Made when the request has its permit, its delta and its edit."""

    def __init__(
        self,
        gate: Gate,
        plan: GatePlan,
        request: GenerationRequest,
        delta: EngineDelta | None,
        ask: Ask,
        decisions: Decisions,
    ) -> None:
        prompt, use = request.prompts[0], request.tools
        assert isinstance(prompt, ChatPrompt)
        assert use is not None
        assert decisions.gated is not None
        self._gate, self._plan, self._request, self._ask = gate, plan, request, ask
        self._use, self._decisions, self._gated = use, decisions, decisions.gated
        sampling = request.sampling
        self._probing = gate.prober.of(
            Target(request.request_id, prompt, use, delta, request.cache_salt, sampling.seed, sampling.n)
        )
        self._asked = GateRequest(
            messages=[message_dict(message) for message in prompt.messages],
            tools=[tool_dict(tool) for tool in use.tools],
            served=plan.served,
            explore_u=random.random(),
            tool_choice=use.choice,
            off=plan.mode == "off",
            allow_require=request.tool_gate.allow_require,
            budget=request.tool_gate.budget,
        )
        self._policy: Policy | None = None

    async def answer(self) -> Events:
        """The answer's events, after the decision. Raises as `ask` does, and EngineDeadError."""
        after = self._plan.found is not None and self._plan.found.version.placement == "post"
        decision = await self._decide(probes=not after)
        if after and (decision is None or decision.reason not in _SETTLED):
            events = self._judged()
        else:
            assert decision is not None  # only without its probes can a decision stay open
            self._tell(decision)
            events = self._changed_or_not(decision) if self._acts(decision) else self._ask(self._use)
        async with aclosing(events):
            async for event in events:
                yield event

    async def _decide(self, calls: Sequence[Any] | None = None, probes: bool = True) -> Decision | None:
        """None: it takes probes, and none may be run. Raises EngineDeadError."""
        started, spent = time.perf_counter(), replace(self._probing.spent)
        try:
            return await self._steps(replace(self._asked, tool_calls=calls), probes, started)
        except EngineDeadError:
            raise
        except Exception as error:  # fail-open: no fault of the gate may cost anybody an answer
            log.exception("the tool gate failed", extra={"fields": {"request_id": self._request.request_id}})
            found = self._plan.found
            return Decision(
                "allow", "gate_error", found.version.policy_id if found else None, problem=type(error).__name__
            )
        finally:
            self._gated.latency_s += time.perf_counter() - started
            self._gated.prompt_tokens += self._probing.spent.prompt_tokens - spent.prompt_tokens
            self._gated.completion_tokens += self._probing.spent.completion_tokens - spent.completion_tokens

    async def _steps(self, asked: GateRequest, probes: bool, started: float) -> Decision | None:
        found, plan = self._plan.found, self._plan
        if found is not None and plan.mode != "off" and self._policy is None:
            self._policy = _adjusted(
                await self._gate.policies.read(found.version.digest),
                self._request.tool_gate.threshold,
                self._gate.settings.timeout_ms,
            )
        step = start(self._policy, asked)
        steered = plan.edits.edits_rows or self._request.options.compare
        if steered and found is not None and (isinstance(step, NeedProbe) or step.reason not in _SETTLED):
            step = Decision("allow", "policy_mismatch", problem="the request is steered, the policy's model was not")
        while isinstance(step, NeedProbe):
            if not probes:
                return None
            outcome = await self._probing.run(step)
            step = advance(step, outcome, 1000 * (time.perf_counter() - started))
        # The id of the policy as it is stored, not as the request adjusted it.
        return replace(step, policy_id=found.version.policy_id) if found and self._policy else step

    def _acts(self, decision: Decision) -> bool:
        return self._plan.mode == "enforce" and decision.action != "allow"

    def _tell(self, decision: Decision) -> None:
        self._gated.decision = decision
        if decision.reason == "policy_mismatch" and self._plan.found is not None and not self._plan.edits.edits_rows:
            self._gate.warn_of_mismatch(self._plan.found.version.digest, decision.problem or "")

    def _fail_open(self, decision: Decision, error: Exception | None) -> None:
        problem = f"the changed request failed: {type(error).__name__ if error else 'no answer'}"
        self._tell(
            replace(decision, action="allow", reason="gate_error", tools_removed=(), draft=None, problem=problem)
        )
        self._gated.choice_out = self._gated.choice_in

    async def _changed_or_not(self, decision: Decision) -> Events:
        """As decided; as it came where that fails before its first event."""
        async with aclosing(self._changed(decision, self._request.sampling.n)) as events:
            first, error = await _first(events)
            if first is not None:
                yield first
                async for event in events:
                    yield event
                return
        self._fail_open(decision, error)
        async with aclosing(self._ask(self._use)) as events:
            async for event in events:
                yield event

    async def _judged(self) -> Events:
        """Placement post: the answer is held back until its calls are judged, and asked again where they are kept back."""
        async with aclosing(self._ask(self._use)) as events:
            held = [event async for event in events]
        calls = calls_of(held)
        decision = await self._decide([call for made in calls.values() for call in made])
        assert decision is not None
        self._tell(decision)
        if self._acts(decision) and decision.action != "require":  # what was to be required is there
            n = self._request.sampling.n
            gone = to_discard(held, calls, decision.tools_removed, n, self._decisions.prompt_tokens)
            again = gone.replace_by(self._changed(decision, len(gone.events)), self._gated, self._decisions)
            async with aclosing(again) as events:
                first, error = await _first(events)
                if first is not None:
                    if self._decisions.tool_calls is not None:
                        self._decisions.tool_calls.suppress(sum(len(calls[number]) for number in gone.events))
                    for event in held:
                        if event.index not in gone.events:
                            yield event
                    yield first
                    async for event in events:
                        yield event
                    return
            self._fail_open(decision, error)
            self._decisions.prompt_tokens = gone.prompt_tokens
        for event in held:
            yield event

    def _changed(self, decision: Decision, n: int) -> Events:
        """`n` choices of the answer as the decision wants it."""
        assert self._policy is not None
        use, gated = self._use, self._gated
        if decision.action == "require":
            gated.choice_out = "required"
            return self._ask(replace(use, choice="required"), n)
        if decision.action == "suppress" and self._policy.suppress_mode == "tool_choice_none":
            gated.choice_out = "none"
            return without_calls(self._ask, use, n, gated, self._decisions)
        kept = tuple(tool for tool in use.tools if tool.name not in decision.tools_removed)
        gated.choice_out = gated.choice_in if kept else None
        if decision.draft is not None and self._plan.edits.edit is None:
            sampling = replace(self._request.sampling, n=n)
            draft = draft_as_answer(self._probing.draft, sampling, self._policy.probes.top_logprobs)
            if draft is not None:
                return replayed(draft, gated, self._decisions)
        return self._ask(replace(use, tools=kept) if kept else None, n)


def _adjusted(policy: Policy, threshold: float | None, most_ms: int) -> Policy:
    """As the request and this server's limit on time have it."""
    probes = policy.probes.model_copy(update={"timeout_ms": min(policy.probes.timeout_ms, most_ms)})
    suppress = policy.thresholds.suppress if threshold is None else threshold
    thresholds = policy.thresholds.model_copy(update={"suppress": suppress})
    return policy.model_copy(update={"probes": probes, "thresholds": thresholds})


async def _first(events: Events) -> tuple[TokenEvent | None, Exception | None]:
    """The first event; None and the error where it does not come. Raises EngineDeadError, ServerOverloaded."""
    try:
        return await anext(events, None), None
    except (EngineDeadError, ServerOverloaded):
        raise
    except (EngineError, GatewayError) as error:
        return None, error
