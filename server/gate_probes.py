"""The gate's probes on the engine: the request's own model, delta and cache salt, asked in the words of gate/signals.py.

Every probe is rows of the engine like any other; leaving one, late or because the client is gone, aborts its rows.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from server.admission import Admission
from server.artifacts.pool import EditPool
from server.core import ChatPrompt, GatewayError, Message, Sampling, TokenEvent, TokenLogprob, ToolUse
from server.engine.base import Engine, EngineDeadError, EngineDelta, EngineEdit, EngineError
from server.prompt import PromptRenderer
from server.steering import Planner
from steering.errors import SteeringError
from steering.gate.signals import (
    TOP_OF_ONE,
    Draft,
    Hidden,
    Peek,
    Probe,
    PTrue,
    Samples,
    Signal,
    call_mass,
    ptrue_messages,
    yes_and_no,
)
from steering.toolgate import Failed, NeedProbe

_LEAST_LOGPROB = -9999.0  # what stands for -inf on the wire, and so in the labels that a policy was fitted on


class ProbeFailed(Exception):
    """A probe cannot be asked, or was not answered; it never leaves this module."""


@dataclass(frozen=True)
class Target:
    """What serves the request: the probes ask nothing else. `rows` are those that its permit covers."""

    request_id: str
    prompt: ChatPrompt
    use: ToolUse
    delta: EngineDelta | None
    cache_salt: str | None
    seed: int | None
    rows: int


@dataclass
class Spent:
    """Tokens that the engine read and wrote for the gate alone."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Prober:
    """What all requests' probes are asked with."""

    engine: Engine
    prompts: PromptRenderer
    planner: Planner
    edits: EditPool
    admission: Admission

    def of(self, target: Target) -> "Probing":
        return Probing(self, target)


class Probing:
    """The probes of one request. `draft` holds the events of the draft once it is there."""

    def __init__(self, prober: Prober, target: Target) -> None:
        self._prober = prober
        self._target = target
        self.spent = Spent()
        self.draft: list[TokenEvent] = []

    async def run(self, need: NeedProbe) -> Signal | Failed:
        """Raises EngineDeadError; whatever else goes wrong is a failed probe. Text of the request is in no problem."""
        try:
            async with asyncio.timeout(need.timeout_ms / 1000):
                return await self._ask(need)
        except EngineDeadError:
            raise
        except TimeoutError:
            return Failed("timeout", f"{need.probe} took more than {need.timeout_ms} ms")
        except ProbeFailed as error:
            return Failed("gate_error", f"{need.probe}: {error}")
        except (EngineError, GatewayError, SteeringError, OSError) as error:
            return Failed("gate_error", f"{need.probe}: {type(error).__name__}")

    async def _ask(self, need: NeedProbe) -> Signal:
        settings, target = need.settings, self._target
        match need.probe:
            case "peek":
                top = await self._one_token(need.probe, replace(target.prompt, tools=target.use.tools))
                return Peek(call_mass(top, settings.call_marker))
            case "ptrue":
                more = [Message(one["role"], one["content"]) for one in ptrue_messages([], need.draft)]
                asked = replace(target.prompt, messages=(*target.prompt.messages, *more))
                return PTrue(*yes_and_no(await self._one_token(need.probe, asked)))
            case "draft":
                greedy = Sampling(settings.max_tokens, temperature=0, logprobs=settings.top_logprobs)
                self.draft = await self._events(
                    need.probe, target.prompt, greedy, enough=lambda events: need.settles(_draft(events))
                )
                return _draft(self.draft)
            case "samples":
                sampled = Sampling(
                    settings.max_tokens, temperature=settings.temperature, n=settings.k, seed=target.seed
                )
                with self._prober.admission.permit(max(settings.k - target.rows, 0)):
                    events = await self._events(need.probe, target.prompt, sampled)
                texts = [""] * settings.k
                for event in events:
                    texts[event.index] += event.text
                return Samples(tuple(texts), completion_tokens=sum(len(event.token_ids) for event in events))
            case "hidden":
                return await self._hidden(need)

    async def _one_token(self, probe: Probe, prompt: ChatPrompt) -> list[tuple[str, float]]:
        events = await self._events(probe, prompt, Sampling(1, temperature=0, logprobs=TOP_OF_ONE))
        tokens = [token for event in events for token in event.logprobs or ()]
        return [(token.text, _finite(token)) for token in tokens[0].top] if tokens else []

    async def _hidden(self, need: NeedProbe) -> Hidden:
        """The score of a profile's probe at the last token of the prompt without tools, as conflict scores are read."""
        digest = need.state.policy.probes.hidden_profile
        if digest is None:
            raise ProbeFailed("the policy names no profile for its probe `hidden`")
        edit = self._prober.planner.probe_edit(digest, "probes.hidden_profile")
        async with self._prober.edits.lease(edit):
            await self._events("hidden", self._target.prompt, Sampling(1, temperature=0), edit.edit)
            report = await self._prober.engine.edit_report(self._row_id("hidden"))
        if report is None or report.score is None:
            raise ProbeFailed("the engine answered without a score")
        return Hidden(report.score)

    async def _events(
        self,
        probe: Probe,
        prompt: ChatPrompt,
        sampling: Sampling,
        edit: EngineEdit | None = None,
        enough: Callable[[Sequence[TokenEvent]], bool] = lambda _: False,
    ) -> list[TokenEvent]:
        """All events, or those before which they were `enough`; the rows are then aborted."""
        engine, target = self._prober.engine, self._target
        ids = await self._prober.prompts.render(prompt, target.delta)
        room = engine.max_model_len - len(ids)
        if room < 1:
            raise ProbeFailed("the prompt leaves no room in the context")
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
        found: list[TokenEvent] = []
        rows = engine.generate(self._row_id(probe), ids, sampling, target.delta, target.cache_salt, edit)
        self.spent.prompt_tokens += len(ids)
        async with aclosing(rows) as events:
            async for event in events:
                self.spent.completion_tokens += len(event.token_ids)
                found.append(event)
                if event.finish_reason is None and enough(found):
                    return found
        if sum(event.finish_reason is not None for event in found) != sampling.n:
            raise ProbeFailed("the engine ended a probe before it was finished")
        return found

    def _row_id(self, probe: Probe) -> str:
        return f"{self._target.request_id}-{probe}"


def _draft(events: Sequence[TokenEvent]) -> Draft:
    tokens = [token for event in events for token in event.logprobs or ()]
    return Draft(
        text="".join(event.text for event in events),
        logprobs=tuple(map(_finite, tokens)),
        tops=tuple(tuple(map(_finite, token.top)) for token in tokens),
        finished=events[-1].finish_reason == "stop",
        stopped=events[-1].finish_reason is None,
    )


def _finite(token: TokenLogprob) -> float:
    assert token.logprob is not None  # only the first token of a prompt has none
    return max(token.logprob, _LEAST_LOGPROB)
