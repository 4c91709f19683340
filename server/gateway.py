"""The request path: `Gateway.generate` is one async generator, read top to bottom (README, "The life of a request")."""

import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import replace
from enum import StrEnum

from server.admission import Admission
from server.artifacts.pool import Pool
from server.artifacts.registry import Registry
from server.core import ChatPrompt, Decisions, GatewayError, GenerationRequest, Sampling, TokenEvent
from server.engine.base import Engine, EngineDeadError, EngineDelta, EngineError
from server.interleave import interleave
from server.prompt import PromptRenderer


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
        registry: Registry,
        pool: Pool,
        admission: Admission,
        prompts: PromptRenderer,
        base_fingerprint: str,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._pool = pool
        self._admission = admission
        self._prompts = prompts
        self.base_fingerprint = base_fingerprint
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
        rows = len(request.prompts) * request.sampling.n
        with self._admission.permit(rows) as permit:
            resolved = self._registry.resolve(request.model)
            decisions.delta = resolved.name if resolved.delta else "base"
            decisions.delta_digest = resolved.delta.digest if resolved.delta else None
            decisions.system_fingerprint = self._system_fingerprint(resolved.delta)
            asked = time.perf_counter()
            async with self._pool.lease(resolved.delta) if resolved.delta else nullcontext():
                decisions.delta_wait_s = time.perf_counter() - asked
                prompts = [await self._prompts.render(prompt) for prompt in request.prompts]
                sampling = self._fit(request, max(len(ids) for ids in prompts))
                decisions.prompt_tokens = sum(len(ids) for ids in prompts)
                permit.queue(decisions.prompt_tokens)
                async with aclosing(self._decode(request, prompts, sampling, resolved.delta)) as events:
                    async for event in events:
                        if decisions.ttft_s is None:
                            decisions.ttft_s = time.perf_counter() - decisions.started
                            permit.started()
                        _count(event, sampling.n, decisions)
                        yield event
                if len(decisions.finish_reasons) != rows:
                    raise EngineError("the engine ended a request before it was finished")
        decisions.total_s = time.perf_counter() - decisions.started

    def _decode(
        self,
        request: GenerationRequest,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        delta: EngineDelta | None,
    ) -> AsyncGenerator[TokenEvent, None]:
        streams = [
            self._engine.generate(f"{request.request_id}-{position}", ids, sampling, delta, request.cache_salt)
            for position, ids in enumerate(prompts)
        ]
        return streams[0] if len(streams) == 1 else interleave(streams, sampling.n)

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

    def _system_fingerprint(self, delta: EngineDelta | None) -> str:
        weights = f"{self.base_fingerprint}+{delta.digest if delta else ''}"
        return f"fp_{hashlib.sha256(weights.encode()).hexdigest()[:12]}"


def _count(event: TokenEvent, n: int, decisions: Decisions) -> None:
    decisions.cached_by_prompt.setdefault(event.index // n, event.cached_tokens)
    decisions.completion_tokens += len(event.token_ids)
    if event.finish_reason is not None:
        decisions.finish_reasons.append(event.finish_reason.value)
