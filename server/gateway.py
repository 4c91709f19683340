"""The request path: `Gateway.generate` is one async generator, read top to bottom (README, "The life of a request")."""

import hashlib
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial

from server.admission import Admission, Permit
from server.artifacts.pool import DeltaPool, EditPool, PlannedEdit
from server.artifacts.registry import DeltaRegistry
from server.core import ChatPrompt, GatewayError, GenerationRequest, Sampling, TokenEvent, ToolUse
from server.decisions import Decisions, ToolCalls
from server.engine.base import Engine, EngineDeadError, EngineDelta, EngineError
from server.gate import Gate
from server.gate_run import Gating
from server.interleave import interleave
from server.prompt import PromptRenderer
from server.proof import Proof, together
from server.steering import Plan, Planner, edited_positions
from server.tools import Toolbox


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    ENGINE_DEAD = "engine_dead"


class NotReady(GatewayError):
    """The base is still loading."""


class Draining(GatewayError):
    """The server is stopping and takes no new requests."""


class ContextLengthExceeded(GatewayError):
    """Prompt and completion do not fit into the model's context."""


class Gateway:
    """One engine and what decides about its requests. `start` and `stop` own the engine's life."""

    def __init__(
        self,
        engine: Engine,
        registry: DeltaRegistry,
        pool: DeltaPool,
        planner: Planner,
        edits: EditPool,
        admission: Admission,
        prompts: PromptRenderer,
        tools: Toolbox,
        gate: Gate,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._pool = pool
        self._planner = planner
        self._edits = edits
        self._admission = admission
        self._prompts = prompts
        self._tools = tools
        self._gate = gate
        self.base_fingerprint = planner.base_fingerprint
        self.created = int(time.time())  # of the base, as /v1/models shows it
        self._state = State.LOADING

    @property
    def state(self) -> State:
        if self._state is State.READY and self._engine.dead:
            return State.ENGINE_DEAD
        return self._state

    @property
    def max_model_len(self) -> int | None:
        """None while the engine loads."""
        return None if self._state is State.LOADING else self._engine.max_model_len

    async def start(self) -> None:
        """Raises EngineError."""
        await self._engine.start()
        if self._state is State.LOADING:
            self._state = State.READY

    def drain(self) -> None:
        self._state = State.DRAINING

    async def stop(self) -> None:
        self.drain()
        await self._pool.close()
        await self._edits.close()
        await self._engine.stop()
        self._prompts.close()

    def require_ready(self) -> None:
        """Raises NotReady, Draining, EngineDeadError."""
        if self.state is State.LOADING:
            raise NotReady("the model is still loading", retry_after_s=5)
        if self.state is State.DRAINING:
            raise Draining("the server is stopping", retry_after_s=5)
        if self.state is State.ENGINE_DEAD:
            raise EngineDeadError("the engine has stopped")

    async def generate(self, request: GenerationRequest, decisions: Decisions) -> AsyncGenerator[TokenEvent, None]:
        """Answer all prompts of a request; choice i of prompt p comes as index p * n + i.

        Raises GatewayError and EngineError before the first event, EngineError after. Closing the iterator aborts the
        engine's rows and returns lease and permit.
        """
        self.require_ready()
        self._tools.check(request.tools)
        rows = len(request.prompts) * request.sampling.n
        with self._admission.permit(rows) as permit:
            resolved = self._registry.resolve(request.model)
            decisions.delta = resolved.name if resolved.delta else "base"
            decisions.delta_digest = resolved.delta.digest if resolved.delta else None
            self._note_identity(request, decisions)
            asked = time.perf_counter()
            plan = self._planner.plan(request, decisions)
            if decisions.steered is not None:
                decisions.steered.overhead_s = time.perf_counter() - asked
            decisions.system_fingerprint = self._system_fingerprint(resolved.delta, plan.edit)
            gated = self._gate.plan(request, resolved.delta, plan, decisions)
            admitted = _Admitted(request, permit, resolved.delta, plan, decisions)
            async with self._leases(resolved.delta, plan.edit, decisions):
                ask = partial(self._ask, admitted)
                gating = Gating(self._gate, gated, request, resolved.delta, ask, decisions) if gated else None
                async with aclosing(gating.answer() if gating else ask(request.tools)) as events:
                    async for event in events:
                        if decisions.ttft_s is None:
                            decisions.ttft_s = time.perf_counter() - decisions.started
                        _count(event, request.sampling.n, decisions)
                        yield event
                if len(decisions.finish_reasons) != rows:
                    raise EngineError("the engine ended a request before it was finished")
        decisions.total_s = time.perf_counter() - decisions.started

    async def _ask(
        self, admitted: "_Admitted", use: ToolUse | None, n: int | None = None
    ) -> AsyncGenerator[TokenEvent, None]:
        """The request's answer with these tools; the gate may ask more than once, and for `n` of its choices."""
        request, plan, decisions = admitted.request, admitted.plan, admitted.decisions
        attempt = next(admitted.attempts)
        prompts = [await self._prompts.render(self._tools.show(prompt, use)) for prompt in request.prompts]
        for ids in prompts:
            edited_positions(plan.prompt, len(ids))  # raises where they lie outside
        fitting = self._fit(request, max(len(ids) for ids in prompts))
        sampling = self._tools.constrain(replace(fitting, n=n or fitting.n), use)
        decisions.prompt_tokens = sum(len(ids) for ids in prompts)
        if attempt == 0:
            admitted.permit.queue(decisions.prompt_tokens)
        decoded = self._decode(admitted, attempt, prompts, sampling)
        async with aclosing(self._tools.read(decoded, use, decisions)) as events:
            async for event in events:
                admitted.permit.started()
                yield event

    def _note_identity(self, request: GenerationRequest, decisions: Decisions) -> None:
        """What a label of this answer, or a policy that is fitted on it, is bound to."""
        decisions.base_fingerprint = self.base_fingerprint
        if isinstance(request.prompts[0], ChatPrompt):
            prompts = self._prompts
            decisions.template_sha256 = prompts.tool_template_sha256 if request.tools else prompts.template_sha256
        if request.tools is not None:
            decisions.tool_calls = ToolCalls(request.tools.choice, len(request.tools.tools))

    @asynccontextmanager
    async def _leases(
        self, delta: EngineDelta | None, edit: PlannedEdit | None, decisions: Decisions
    ) -> AsyncIterator[None]:
        """Delta and edit are resident inside the block, and both count as in use before the first wait."""
        held_delta = self._pool.hold(delta) if delta else nullcontext()
        with held_delta, self._edits.hold(edit) if edit else nullcontext():
            asked = time.perf_counter()
            if delta is not None:
                await self._pool.make_resident(delta)
            decisions.delta_wait_s = time.perf_counter() - asked
            if edit is not None:
                asked = time.perf_counter()
                await self._edits.make_resident(edit)
                if decisions.steered is not None:
                    decisions.steered.overhead_s += time.perf_counter() - asked
            yield

    def _decode(
        self, admitted: "_Admitted", attempt: int, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> AsyncGenerator[TokenEvent, None]:
        request, plan = admitted.request, admitted.plan
        edit = plan.edit.edit if plan.edit else None
        proof = Proof(self._engine, plan, admitted.decisions) if edit else None
        streams = []
        for position, ids in enumerate(prompts):
            row_id = f"{request.request_id}-{position}" + (f"-again{attempt}" if attempt else "")
            stream = self._engine.generate(row_id, ids, sampling, admitted.delta, request.cache_salt, edit)
            streams.append(proof.watch(position, row_id, len(ids), stream) if proof else stream)
        if len(streams) == 1:
            return streams[0]
        joined = interleave(streams, sampling.n)
        return together(joined, len(streams), sampling.n) if proof and proof.before_first_token else joined

    def _fit(self, request: GenerationRequest, prompt_tokens: int) -> Sampling:
        """The sampling with a token limit that fits the context. Raises ContextLengthExceeded."""
        sampling, context = request.sampling, self._engine.max_model_len
        room = context - prompt_tokens
        if room < 1:
            param = "messages" if isinstance(request.prompts[0], ChatPrompt) else "prompt"
            raise ContextLengthExceeded(
                f"the prompt has {prompt_tokens} tokens and leaves no room in the context of {context}", param=param
            )
        if request.fill_context:
            return replace(sampling, max_tokens=min(sampling.max_tokens, room))
        if sampling.max_tokens > room:
            raise ContextLengthExceeded(
                f"the prompt's {prompt_tokens} tokens and max_tokens {sampling.max_tokens} "
                f"together exceed the context of {context}",
                param="max_tokens",
            )
        return sampling

    def _system_fingerprint(self, delta: EngineDelta | None, edit: PlannedEdit | None) -> str:
        weights = f"{self.base_fingerprint}+{delta.digest if delta else ''}"
        if edit is not None:
            weights += f"+{edit.edit.fingerprint}"
        return f"fp_{hashlib.sha256(weights.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class _Admitted:
    """A request that has its permit and its leases. `attempts` numbers how often the engine is asked for its answer."""

    request: GenerationRequest
    permit: Permit
    delta: EngineDelta | None
    plan: Plan
    decisions: Decisions
    attempts: Iterator[int] = field(default_factory=itertools.count)


def _count(event: TokenEvent, n: int, decisions: Decisions) -> None:
    decisions.cached_by_prompt.setdefault(event.index // n, event.cached_tokens)
    decisions.completion_tokens += len(event.token_ids)
    if event.finish_reason is not None:
        decisions.finish_reasons.append(event.finish_reason.value)
