"""The engine: vLLM's AsyncLLM, whose core runs in a child process, with our plugin inside.

Deltas, and combinations of them, travel as LoRA requests whose name is the content digest. The first loads come through `load`, on
the gateway's word alone; the request then only names what is resident.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import json
import multiprocessing
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressors.errors import DeltaError
from compressors.footprint import Form, execution_nbytes
from server.config import EngineSettings
from server.core import FinishReason, Sampling, TokenEvent, TokenLogprob
from server.engine.arguments import engine_arguments, set_environment
from server.engine.base import (
    EditReport,
    EditUnavailableError,
    EngineDeadError,
    EngineDelta,
    EngineEdit,
    EngineError,
    EngineLoadError,
    EngineStep,
    LayerReport,
)
from server.engine.decoding import DeltaDecoding
from server.engine.flags import passed_on
from server.engine.sampling import check_grammar, sampling_error, sampling_params
from server.engine.worker.positions import EditedRequest, Positions

if TYPE_CHECKING:
    from prometheus_client import Metric
    from vllm.logprobs import Logprob
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

_STOP_TIMEOUT_S = 20
_DEATH_POLL_S = 0.25  # of a call that the engine may never answer
_FORMS: dict[str, Form] = {"torch-csr": "csr", "triton-slots": "masked"}


class VLLMEngine:
    """Serves one base model and the deltas loaded into it. `start` before anything else, and again after `stop`."""

    def __init__(
        self, base: Path, settings: EngineSettings, own_tokenizer: Callable[[EngineDelta], Any] = lambda delta: None
    ) -> None:
        self._base = base
        self._settings = settings
        self._decoding = DeltaDecoding(own_tokenizer)
        self._llm: AsyncLLM | None = None
        self._adapter_ids: dict[str, int] = {}
        self._next_id = itertools.count(1)
        self._resident: set[str] = set()  # digests; vLLM would end over a row whose delta is not there
        self._edits: dict[str, _LoadedEdit] = {}
        self._max_model_len = 0
        self._observe: Callable[[EngineStep], None] = lambda step: None
        self._rows = 0  # requests whose iterator is open
        self._calls = 0  # that the workers have not answered
        self._signs = 0
        self.kernel = ""

    async def start(self) -> None:
        """Load the base model. Raises EngineError when the model or the installed vLLM does not fit."""
        self._resident.clear()
        self._edits.clear()
        await asyncio.to_thread(self._build)
        self._max_model_len = self._running().model_config.max_model_len
        statuses = await self._ask_workers("deltaworks_status")
        if any(status["manager"] != "DeltaManager" for status in statuses):
            raise EngineError(
                "the Deltaworks plugin is not active inside vLLM; is the distribution installed, and does VLLM_PLUGINS name it?"
            )
        self.kernel = statuses[0]["kernel"]

    async def stop(self) -> None:
        """End vLLM's processes, and every request that still waits for them."""
        from vllm.v1.engine.exceptions import EngineDeadError as VLLMDeadError

        llm, self._llm = self._llm, None
        if llm is not None:
            # A request that came while vLLM told all others of its death would wait for ever.
            llm.output_processor.propagate_error(VLLMDeadError())
            # On the loop: vLLM's reader task must not run between the engine's end and its own.
            llm.shutdown(timeout=_STOP_TIMEOUT_S)
            del llm
            gc.unfreeze()  # vLLM froze the heap that holds it
            gc.collect()  # its finaliser fails when left to the interpreter's end

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def dead(self) -> bool:
        return self._llm is not None and bool(self._llm.errored)

    @property
    def busy(self) -> bool:
        """By what we wait for and by what vLLM does: a client that reads slowly keeps its iterator open."""
        if self._llm is None:
            return False
        return self._calls > 0 or (self._rows > 0 and self._llm.output_processor.has_unfinished_requests())

    @property
    def signs(self) -> int:
        return self._signs

    def kill(self) -> None:
        """vLLM sees that its core is gone, and tells every request."""
        for process in multiprocessing.active_children():  # nobody else has any in this process
            process.kill()

    @property
    def dtype(self) -> str:
        return "" if self._llm is None else str(self._llm.model_config.dtype).removeprefix("torch.")

    def watch(self, observe: Callable[[EngineStep], None]) -> None:
        self._observe = observe

    def _observed(self, step: EngineStep) -> None:
        self._signs += 1
        self._observe(step)

    def own_metrics(self) -> Iterable[Metric]:
        if self._llm is None:
            return ()
        from server.engine.stats import own_metrics

        return own_metrics()

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        delta: EngineDelta | None,
        cache_salt: str | None,
        edit: EngineEdit | None = None,
    ) -> AsyncGenerator[TokenEvent, None]:
        """New tokens of every choice as they come. Closing the iterator aborts the rows."""
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError as VLLMDeadError
        from vllm.v1.engine.exceptions import EngineGenerateError

        from server.engine.stats import timed

        prompt = TokensPrompt(prompt_token_ids=list(prompt_ids))
        if cache_salt is not None:
            prompt["cache_salt"] = cache_salt
        if delta is not None and delta.digest not in self._resident:
            raise EngineDeadError("the engine has been restarted since the delta was loaded")
        lora = None if delta is None else self._lora_request(delta)
        llm = self._running()
        begun: set[int] = set()
        self._rows += 1
        try:
            params = sampling_params(sampling, delta)
            if edit is not None:
                params.extra_args = self._edited_request(edit, request_id).to_extra_args()
            stream = llm.generate(prompt, params, request_id, lora_request=lora, priority=sampling.priority)
            async with self._decoding.used(delta), aclosing(stream):
                async for output in stream:
                    if sampling.structure is not None:
                        check_grammar(output, sampling.structure)
                    for event in _events(output, sampling):
                        yield timed(event, output.metrics, begun)
        except VLLMValidationError as error:
            raise sampling_error(error, sampling) from error
        except VLLMDeadError as error:
            raise EngineDeadError("the engine stopped") from error
        except EngineGenerateError as error:
            if llm.errored:
                raise EngineDeadError("the engine stopped") from error
            raise EngineError(f"the engine failed on this request: {error}") from error
        finally:
            self._rows -= 1

    async def measure(self, delta: EngineDelta) -> int:
        """Bytes that a delta will take in execution form on one worker, from its header."""
        form = _FORMS.get(self.kernel, "sparse")
        try:
            return await asyncio.to_thread(execution_nbytes, Path(delta.path), form)
        except (OSError, DeltaError) as error:
            raise EngineLoadError(f"delta {delta.digest:.12} cannot be loaded: {error}") from error

    async def load(self, delta: EngineDelta) -> int:
        """Make a delta resident on every worker; returns its bytes in execution form, all workers together."""
        adapter = self._lora_request(delta).lora_int_id
        if delta.parts:
            parts = [(self._lora_request(part.delta).lora_int_id, part.weight) for part in delta.parts]
            replies = await self._ask_workers("deltaworks_combine", delta.digest, adapter, parts)
        else:
            replies = await self._ask_workers("deltaworks_load", delta.digest, adapter, delta.path)
        errors = [reply["error"] for reply in replies if "error" in reply]
        if errors:
            await self.unload(delta)
            raise EngineLoadError(errors[0])
        self._resident.add(delta.digest)
        return sum(reply["nbytes"] for reply in replies)

    async def unload(self, delta: EngineDelta) -> None:
        """Drop a delta from memory; nothing happens when it is not resident."""
        self._resident.discard(delta.digest)
        adapter = self._lora_request(delta).lora_int_id
        if delta.parts:  # there is no end to weights, so their numbers are not kept
            del self._adapter_ids[delta.digest]
        await self._ask_workers("deltaworks_unload", adapter)

    async def load_edit(self, edit: EngineEdit) -> None:
        """Make an edit resident on every worker. Raises EngineLoadError, or EditUnavailableError where no edit can work."""
        for reply in await self._ask_workers("deltaworks_edit_load", edit.fingerprint, edit.spec):
            if reply:
                await self.unload_edit(edit)
                error = EditUnavailableError if "unavailable" in reply else EngineLoadError
                raise error(next(iter(reply.values())))
        spec = json.loads(edit.spec)
        self._edits[edit.fingerprint] = _LoadedEdit(
            Positions(spec["prompt"], spec["generation"]), edits=bool(spec["tables"])
        )

    async def unload_edit(self, edit: EngineEdit) -> None:
        """Drop an edit; requests that run with it keep it to their end."""
        self._edits.pop(edit.fingerprint, None)
        await self._ask_workers("deltaworks_edit_unload", edit.fingerprint)

    async def edit_report(self, request_id: str) -> EditReport | None:
        """What the workers did for a request since its start; None when they never saw it, or were asked before."""
        replies = await self._ask_workers("deltaworks_edit_report", request_id)
        found = [reply for reply in replies if reply is not None]
        return _edit_report(found) if found else None

    def _edited_request(self, edit: EngineEdit, ticket: str) -> EditedRequest:
        loaded = self._edits.get(edit.fingerprint)
        if loaded is None:
            raise EngineDeadError("the edit is not resident; the engine may have been restarted since it was loaded")
        return EditedRequest(edit.fingerprint, ticket, loaded.positions, loaded.edits)

    async def _ask_workers(self, method: str, *args: object) -> list[Any]:
        """Call one of our methods (worker/extension.py) on every worker: a reply each. Raises EngineDeadError."""
        from vllm.v1.engine.exceptions import EngineDeadError as VLLMDeadError

        llm = self._running()
        asking = asyncio.ensure_future(llm.collective_rpc(method, args=args))
        self._calls += 1
        try:
            # vLLM leaves the calls of a process that was killed without an answer.
            while not (await asyncio.wait({asking}, timeout=_DEATH_POLL_S))[0]:
                if llm is not self._llm or self.dead:
                    raise EngineDeadError("the engine stopped")
            replies: list[Any] = asking.result()
            self._signs += 1
        except VLLMDeadError as error:
            raise EngineDeadError("the engine stopped") from error
        finally:
            self._calls -= 1
            asking.cancel()
        return replies

    def _running(self) -> AsyncLLM:
        if self._llm is None:
            raise EngineDeadError("the engine is not running")
        return self._llm

    def _lora_request(self, delta: EngineDelta) -> Any:
        from vllm.lora.request import LoRARequest

        adapter = self._adapter_ids.get(delta.digest)
        if adapter is None:
            adapter = self._adapter_ids[delta.digest] = next(self._next_id)
        return LoRARequest(delta.digest, adapter, delta.path or "combination")

    def _build(self) -> None:
        """Keeps vLLM's engine here and nowhere else: whatever else held it would hold it past `stop`."""
        set_environment(self._settings)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.utils.ompmultiprocessing import OMPProcessManager
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.executor import Executor
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        from server.engine.worker.compat import IncompatibleEngineError, check

        try:
            check()
            from server.engine.stats import stat_loggers

            ours = engine_arguments(self._base, self._settings)
            args = AsyncEngineArgs(**ours, **passed_on(self._settings.vllm, ours))
            config = args.create_engine_config(UsageContext.ENGINE_CONTEXT)
            told: dict[str, Any] = {
                "log_stats": False,
                "log_requests": False,
                "stat_loggers": stat_loggers(self._observed),
            }
            if config.parallel_config.world_size > 1:  # vLLM's own flags ask for more workers, and vLLM starts them
                self._llm = AsyncLLM(config, Executor.get_class(config), **told)
            else:
                # The worker lives in the engine's process on CPUs too: one import and one hop less. vLLM asks for a process
                # of the worker's own there, to give it OMP's variables; we give them to the engine's process, which is spawned.
                with OMPProcessManager(config).configure_omp_envs(rank=0, local_rank=0):
                    self._llm = AsyncLLM(config, UniProcExecutor, **told)
            self._decoding.install(self._llm.output_processor)
        except (ValueError, RuntimeError, OSError, IncompatibleEngineError) as error:
            raise EngineError(f"vLLM cannot serve {self._base}: {error}") from error


@dataclasses.dataclass(frozen=True)
class _LoadedEdit:
    """What every request with a resident edit must carry."""

    positions: Positions
    edits: bool


def _edit_report(replies: Sequence[dict[str, Any]]) -> EditReport:
    """One report of several workers': ranks of a tensor-parallel group repeat a layer, pipeline stages own different ones."""
    layers = {layer["layer"]: LayerReport(**layer) for reply in replies for layer in reply["layers"]}
    positions = {p for reply in replies for start, end in reply["positions"] for p in range(start, end)}
    scores = [reply["score"] for reply in replies if reply["score"] is not None]
    return EditReport(
        positions=tuple(sorted(positions)),
        layers=tuple(layers[layer] for layer in sorted(layers)),
        score=scores[0] if scores else None,
        applied=bool(positions),
    )


def _events(output: RequestOutput, sampling: Sampling) -> list[TokenEvent]:
    prompt_tokens, wanted = len(output.prompt_token_ids or ()), sampling.prompt_logprobs
    of_prompt: tuple[TokenLogprob, ...] = ()
    if wanted is not None and output.prompt_logprobs:  # with the first output alone; the first token has none
        of_prompt = _logprobs(output.prompt_token_ids[1:], output.prompt_logprobs[1:], wanted)
    return [
        TokenEvent(
            index=choice.index,
            text=choice.text,
            token_ids=tuple(choice.token_ids),
            logprobs=(
                None
                if sampling.logprobs is None
                else _logprobs(choice.token_ids, choice.logprobs or (), sampling.logprobs)
            ),
            finish_reason=_finish_reason(choice.finish_reason),
            prompt_tokens=prompt_tokens,
            cached_tokens=output.num_cached_tokens or 0,
            prompt_logprobs=of_prompt,
        )
        for choice in output.outputs
    ]


def _finish_reason(reason: str | None) -> FinishReason | None:
    if reason is None:
        return None
    if reason not in (FinishReason.STOP, FinishReason.LENGTH):
        raise EngineError(f"the engine ended the request early ({reason})")
    return FinishReason(reason)


def _logprobs(token_ids: Sequence[int], logprobs: Iterable[Any], num_logprobs: int) -> tuple[TokenLogprob, ...]:
    """vLLM lists the chosen token together with the likeliest ones, which carry the ranks 1, 2, ..."""
    tokens = []
    for token_id, found in zip(token_ids, logprobs, strict=True):
        ranked = sorted(found.items(), key=lambda item: item[1].rank)
        top = tuple(_token_logprob(i, entry) for i, entry in ranked if entry.rank <= num_logprobs)
        tokens.append(dataclasses.replace(_token_logprob(token_id, found[token_id]), top=top))
    return tuple(tokens)


def _token_logprob(token_id: int, found: Logprob) -> TokenLogprob:
    return TokenLogprob(token_id, found.decoded_token or "", found.logprob)
