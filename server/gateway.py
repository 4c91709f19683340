"""The request path: `Gateway.generate` is one async generator, read top to bottom (README, "The life of a request")."""

import hashlib
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

from server.admission import Admission, Permit
from server.artifacts.delta_pool import DeltaPool
from server.artifacts.pool import EditLoadFailed, EditPool, NoCapacity, PlannedEdit
from server.artifacts.registry import DeltaRegistry, Resolved
from server.background import Background
from server.config import RestartSettings
from server.core import (
    ChatPrompt,
    GatewayError,
    GenerationRequest,
    InvalidRequest,
    Prompt,
    Sampling,
    TokenEvent,
    ToolUse,
)
from server.decisions import Decisions, ToolCalls
from server.echo import echoed
from server.engine.base import EditUnavailableError, Engine, EngineDeadError, EngineDelta, EngineEdit, EngineError
from server.gate import Gate
from server.gate_run import Gating
from server.interleave import interleave
from server.keys import ANYBODY, Caller
from server.metrics.generation import GenerationMetrics
from server.prompt import PromptRenderer
from server.proof import EditNotApplied, Proof, together
from server.steering import Plan, Planner, edited_positions
from server.supervisor import LifeMetrics, State, Supervisor
from server.tools import Toolbox
from server.turns import Flow, Turns


class ContextLengthExceeded(GatewayError):
    """Prompt and completion do not fit into the model's context."""


@dataclass(frozen=True)
class Work:
    """A request whose names, prompts and limits are settled. `row_id` begins the engine's name of every row."""

    request: GenerationRequest
    row_id: str
    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    delta: EngineDelta | None


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
        turns: Turns,
        restart: RestartSettings,
        life_metrics: LifeMetrics,
        metrics: GenerationMetrics,
        background: Sequence[Background],
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
        self._turns = turns
        self._metrics = metrics
        self._background = background
        self.base_fingerprint = planner.base_fingerprint
        self.created = int(time.time())  # of the base, as /v1/models shows it
        self.supervisor = Supervisor(engine, restart, life_metrics, self._forget_residents, self._restore_residents)

    @property
    def max_model_len(self) -> int | None:
        """None while the engine loads for the first time."""
        return self._engine.max_model_len if self.supervisor.started else None

    async def start(self) -> None:
        """Raises EngineError."""
        await self.supervisor.start()
        for task in self._background:
            task.start()

    async def stop(self) -> None:
        for task in self._background:
            await task.stop()
        await self.supervisor.close()
        await self._pool.close()
        await self._edits.close()
        await self._engine.stop()
        self._prompts.close()

    @property
    def state(self) -> State:
        return self.supervisor.state

    @property
    def idle(self) -> bool:
        """Whether no request holds a permit."""
        return not self._admission.rows

    def drain(self) -> None:
        """Take no new requests any more: the server is stopping."""
        self.supervisor.drain()

    def require_ready(self) -> None:
        """Raises NotReady, Draining, EngineDeadError."""
        self.supervisor.require_ready()

    async def _forget_residents(self) -> None:
        await self._edits.reset()
        await self._pool.reset()

    def _restore_residents(self, first: bool) -> None:
        """Not where the engine keeps dying: then each delta is loaded when a request asks for it."""
        if first:
            self._pool.keep(self._registry.pinned())
            self._pool.restore()

    async def generate(
        self, request: GenerationRequest, decisions: Decisions, caller: Caller = ANYBODY
    ) -> AsyncGenerator[TokenEvent, None]:
        """Answer all prompts of a request; choice i of prompt p comes as index p * n + i, a comparison's plain answer as 1.

        Raises GatewayError and EngineError before the first event, EngineError after. Closing the iterator aborts the
        engine's rows and returns lease, turn and permit.
        """
        self.require_ready()
        try:
            async with aclosing(self._generate(request, decisions, caller)) as events:
                async for event in events:
                    yield event
        except EngineDeadError as error:
            raise self.supervisor.dead_error() from error

    async def _generate(
        self, request: GenerationRequest, decisions: Decisions, caller: Caller
    ) -> AsyncGenerator[TokenEvent, None]:
        decisions.model, decisions.sampling = request.model, request.sampling
        self._tools.check(request.tools)
        with self._metrics.tracking(decisions), self._admission.permit(request.rows, caller) as permit:
            asked = time.perf_counter()
            resolved = self._resolve(request, caller)
            self._prompts.check_tokens(request.sampling, resolved.delta)
            decisions.delta = resolved.name if resolved.delta else "base"
            decisions.parts = resolved.parts
            decisions.delta_digest = resolved.delta.digest if resolved.delta else None
            decisions.delta_version = resolved.version
            decisions.took("resolve_delta", asked)
            self._note_identity(request, resolved.delta, decisions)
            asked = time.perf_counter()
            wanted = self._planner.plan(request, decisions)
            if decisions.steered is not None:
                decisions.steered.overhead_s = time.perf_counter() - asked
            decisions.system_fingerprint = self._system_fingerprint(
                resolved.delta, wanted.edit.edit if wanted.edit else None
            )
            gated = self._gate.plan(request, resolved.delta, wanted, decisions)
            asking = _Asking(request, permit, resolved.delta, wanted, decisions)
            async with self._leases(asking, gated is None):
                ask = partial(self._ask, asking)
                gating = Gating(self._gate, gated, request, resolved.delta, ask, decisions) if gated else None
                async with aclosing(gating.answer() if gating else ask(request.tools)) as events:
                    async for event in events:
                        self._metrics.saw(event, decisions)
                        _count(event, request.sampling.n, decisions)
                        asking.flow.served(len(event.token_ids))
                        yield event
                if len(decisions.finish_reasons) != request.rows:
                    raise EngineError("the engine ended a request before it was finished")
        decisions.total_s = time.perf_counter() - decisions.started

    async def tokenize(self, delta: EngineDelta | None, prompt: Prompt, use: ToolUse | None) -> list[int]:
        """The ids of a prompt as `generate` has them. Raises InvalidRequest, NoChatTemplate, EngineLoadError."""
        return await self._prompts.tokenize(self._tools.show(prompt, use), delta)

    async def _ask(
        self, asking: "_Asking", use: ToolUse | None, n: int | None = None
    ) -> AsyncGenerator[TokenEvent, None]:
        """The request's answer with these tools; the gate may ask more than once, and for `n` of its choices."""
        request, decisions = asking.request, asking.decisions
        attempt = next(asking.attempts)
        prompts = asking.prompts or await self._render(asking, use)
        fitting = self._fit(request, max(len(ids) for ids in prompts))
        sampling = self._tools.constrain(replace(fitting, n=n or fitting.n), use)
        if attempt == 0 and not asking.prompts:
            asking.permit.queue(decisions.prompt_tokens)
            asking.flow.served(decisions.prompt_tokens)
        row_id = request.request_id + (f"-again{attempt}" if attempt else "")
        answered = self._answer(Work(request, row_id, prompts, sampling, asking.delta), asking.plan, decisions)
        if request.echo is not None:
            both = zip(request.prompts, prompts, strict=True)
            texts = [await self._prompts.echo(prompt, ids, asking.delta) for prompt, ids in both]
            answered = echoed(answered, texts, sampling.n, request.echo == "prompt")
        async with aclosing(self._tools.read(answered, use, decisions)) as events:
            async for event in events:
                asking.permit.started()
                yield event

    async def _render(self, asking: "_Asking", use: ToolUse | None) -> Sequence[Sequence[int]]:
        """The prompts' tokens with these tools. Raises InvalidRequest, NoChatTemplate, EditError."""
        request = asking.request
        delta = asking.delta
        prompts = [await self._prompts.render(self._tools.show(prompt, use), delta) for prompt in request.prompts]
        for ids in prompts:
            edited_positions(asking.wanted.prompt, len(ids))  # raises where they lie outside
        asking.decisions.prompt_tokens = sum(len(ids) for ids in prompts) * (2 if request.options.compare else 1)
        return prompts

    def _resolve(self, request: GenerationRequest, caller: Caller) -> Resolved:
        """Raises ModelNotFound, InvalidRequest."""
        if not request.combine:
            return self._registry.resolve(request.model, caller.may_use)
        chat = isinstance(request.prompts[0], ChatPrompt)
        return self._registry.combine(request.model, request.combine, chat, caller.may_use)

    def _note_identity(self, request: GenerationRequest, delta: EngineDelta | None, decisions: Decisions) -> None:
        """What a label of this answer, or a policy that is fitted on it, is bound to."""
        decisions.base_fingerprint = self.base_fingerprint
        if isinstance(request.prompts[0], ChatPrompt):
            prompts = self._prompts
            own = hashlib.sha256(delta.chat_template.encode()).hexdigest() if delta and delta.chat_template else ""
            decisions.template_sha256 = (
                prompts.tool_template_sha256 if request.tools else own or prompts.template_sha256
            )
        if request.tools is not None:
            decisions.tool_calls = ToolCalls(request.tools.choice, len(request.tools.tools))

    @asynccontextmanager
    async def _leases(self, asking: "_Asking", ungated: bool) -> AsyncIterator[None]:
        """It is the request's turn, and delta and edit are resident, inside the block; both are in use before the first wait.

        `ungated`: the prompts are those of the request as it came, so they are rendered and counted before the turn. Sets
        the plan that holds: without an edit where there is none, or where it is lacking and the client allows that.
        """
        delta, wanted, decisions = asking.delta, asking.wanted, asking.decisions
        edit, rows = wanted.edit, asking.request.rows
        held_delta = self._pool.hold(delta) if delta else nullcontext()
        with held_delta, ExitStack() as held_edit:
            if edit is not None:
                held_edit.enter_context(self._edits.hold(edit))
            async with AsyncExitStack() as turn:
                with ExitStack() as parked:
                    if delta is not None:
                        parked.enter_context(self._pool.parked(delta))
                    if edit is not None:
                        parked.enter_context(self._edits.parked(edit))
                    if ungated:
                        asking.prompts = await self._render(asking, asking.request.tools)
                        self._fit(asking.request, max(len(ids) for ids in asking.prompts))
                        asking.permit.queue(decisions.prompt_tokens)
                    asked = time.perf_counter()
                    key = delta.digest if delta else None
                    waiting = self._turns.turn(key, rows, decisions.prompt_tokens)
                    asking.flow = await turn.enter_async_context(waiting)
                    decisions.queue_s = time.perf_counter() - asked
                await self._make_resident(asking, held_edit)
                yield

    async def _make_resident(self, asking: "_Asking", held_edit: ExitStack) -> None:
        delta, wanted, decisions = asking.delta, asking.wanted, asking.decisions
        asked = time.perf_counter()
        if delta is not None:
            decisions.phase, decisions.swap = "loading_delta", self._pool.look_up(delta)
            await self._pool.make_resident(delta)
            self._pool.waited(decisions.swap, time.perf_counter() - asked)
            decisions.took("load_delta", asked)
        decisions.delta_wait_s, decisions.phase = time.perf_counter() - asked, "prefill"
        asking.plan = wanted
        if wanted.edit is not None:
            try:
                await self._load_edit(wanted.edit, decisions)
            except (NoCapacity, EditLoadFailed, EditUnavailableError) as error:
                if not wanted.best_effort:
                    raise
                held_edit.close()
                decisions.answer_plainly(str(error))
                asking.plan = Plan()

    async def _load_edit(self, edit: PlannedEdit, decisions: Decisions) -> None:
        """Raises NoCapacity, EditLoadFailed, EngineError."""
        asked = time.perf_counter()
        try:
            await self._edits.make_resident(edit)
        finally:
            if decisions.steered is not None:
                decisions.steered.overhead_s += time.perf_counter() - asked

    async def _answer(self, work: Work, plan: Plan, decisions: Decisions) -> AsyncGenerator[TokenEvent, None]:
        """Decode; where the edit turns out not to be made before the first token and the client allows that, plainly."""
        begun = False
        try:
            async with aclosing(self._decode(work, plan, decisions)) as events:
                async for event in events:
                    begun = True
                    yield event
            return
        except EditNotApplied as error:
            if begun or not plan.best_effort:
                raise
            decisions.answer_plainly(str(error))
        async with aclosing(self._decode(replace(work, row_id=f"{work.row_id}-plain"), Plan(), decisions)) as events:
            async for event in events:
                yield event

    def _decode(self, work: Work, plan: Plan, decisions: Decisions) -> AsyncGenerator[TokenEvent, None]:
        request, sampling = work.request, work.sampling
        edit = plan.edit.edit if plan.edit else None
        decisions.system_fingerprint = self._system_fingerprint(work.delta, edit)
        proof = Proof(self._engine, plan, decisions) if edit else None
        streams = []
        for position, ids in enumerate(work.prompts):
            row_id = f"{work.row_id}-{position}"
            stream = self._engine.generate(row_id, ids, sampling, work.delta, request.cache_salt, edit)
            streams.append(proof.watch(position, row_id, len(ids), stream) if proof else stream)
        if request.options.compare:
            row_id, ids = f"{work.row_id}-default", work.prompts[0]
            streams.append(self._engine.generate(row_id, ids, sampling, work.delta, request.cache_salt))
        if len(streams) == 1:
            return streams[0]
        joined = interleave(streams, sampling.n)
        return together(joined, len(streams), sampling.n) if proof and proof.before_first_token else joined

    def _fit(self, request: GenerationRequest, prompt_tokens: int) -> Sampling:
        """The sampling with a token limit that fits the context. Raises ContextLengthExceeded, InvalidRequest."""
        sampling, context = request.sampling, self._engine.max_model_len
        room = context - prompt_tokens
        if room < 1:
            param = "messages" if isinstance(request.prompts[0], ChatPrompt) else "prompt"
            raise ContextLengthExceeded(
                f"the prompt has {prompt_tokens} tokens and leaves no room in the context of {context}", param=param
            )
        if request.fill_context:
            sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
        if sampling.max_tokens > room:
            raise ContextLengthExceeded(
                f"the prompt's {prompt_tokens} tokens and max_tokens {sampling.max_tokens} "
                f"together exceed the context of {context}",
                param="max_tokens",
            )
        if sampling.min_tokens > sampling.max_tokens:
            raise InvalidRequest(
                f"min_tokens {sampling.min_tokens} is more than the answer may have, {sampling.max_tokens}",
                param="min_tokens",
            )
        return sampling

    def _system_fingerprint(self, delta: EngineDelta | None, edit: EngineEdit | None) -> str:
        weights = f"{self.base_fingerprint}+{delta.digest if delta else ''}"
        if edit is not None:
            weights += f"+{edit.fingerprint}"
        return f"fp_{hashlib.sha256(weights.encode()).hexdigest()[:12]}"


@dataclass
class _Asking:
    """A request that has its permit. Not frozen: what is settled on the way is kept here.

    `flow` is the delta's, once it is the request's turn; `plan` is what is left of the edit that is `wanted`, once there is
    a lease; `prompts` are set where no gate may change them; `attempts` numbers how often the engine is asked for the answer.
    """

    request: GenerationRequest
    permit: Permit
    delta: EngineDelta | None
    wanted: Plan
    decisions: Decisions
    plan: Plan = field(default_factory=Plan)
    flow: Flow = field(default_factory=lambda: Flow(None, 0))
    prompts: Sequence[Sequence[int]] = ()
    attempts: Iterator[int] = field(default_factory=itertools.count)


def _count(event: TokenEvent, n: int, decisions: Decisions) -> None:
    decisions.cached_by_prompt.setdefault(event.index // n, event.cached_tokens)
    decisions.completion_tokens += len(event.token_ids)
    if event.finish_reason is not None:
        decisions.finish_reasons.append(event.finish_reason.value)
