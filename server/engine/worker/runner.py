"""Tells the edit plane about every batch: wraps methods of vLLM's model runner, of whichever version this process has.

`execute_model` brings the requests that enter and leave, and ends the step; the preparation of inputs fixes which rows are whose.
Prompts whose tokens are scored go through the head one by one, and the delta plane is told whose.
V1 runs on CPUs and is what our tests run. V2 is the default on GPUs: its names are checked at start, but no test runs it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from server.engine.worker.edit_plan import Chunk
from server.engine.worker.edits import EditPlane

V1 = "vllm.v1.worker.gpu_model_runner"
V2 = "vllm.v1.worker.gpu.model_runner"


def install() -> None:
    """Wrap the runners that are loaded in this process; a second call does nothing. Runners without an edit plane are as before."""
    for module, prepare, chunks in ((V1, "_prepare_inputs", _v1_chunks), (V2, "prepare_inputs", _v2_chunks)):
        if module not in sys.modules:
            continue
        runner = sys.modules[module].GPUModelRunner
        if not getattr(runner.execute_model, "deltaworks", False):
            runner.execute_model = _executing(runner.execute_model)
            setattr(runner, prepare, _preparing(getattr(runner, prepare), chunks))
            if module == V1:
                runner._get_prompt_logprobs_dict = _scoring(runner._get_prompt_logprobs_dict)


def _plane(runner: Any) -> EditPlane | None:
    """vLLM's stock LoRA manager has no `edits`."""
    plane: EditPlane | None = getattr(getattr(runner, "lora_manager", None), "edits", None)
    return plane


def _executing(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        plane = _plane(self)
        if plane is None:
            return inner(self, scheduler_output, *args, **kwargs)
        plane.finish(scheduler_output.finished_req_ids)
        for new in scheduler_output.scheduled_new_reqs:
            plane.admit(new.req_id, new.sampling_params, new.prompt_len, new.num_computed_tokens)
        try:
            return inner(self, scheduler_output, *args, **kwargs)
        finally:
            plane.end()

    execute_model.deltaworks = True  # type: ignore[attr-defined]  # the mark that `install` looks for
    return execute_model


def _preparing(inner: Callable[..., Any], chunks: Callable[..., Iterable[Chunk]]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def prepare(self: Any, scheduler_output: Any, second: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = inner(self, scheduler_output, second, *args, **kwargs)
        plane = _plane(self)
        if plane is not None and plane.busy:
            plane.begin(chunks(self, second, prepared))
        return prepared

    return prepare


def _scoring(inner: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """One request at a time: the head must know to which delta the prompt goes."""

    @functools.wraps(inner)
    def scored(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        waiting: dict[str, int] = self.num_prompt_logprobs
        manager: Any = getattr(self, "lora_manager", None)
        if not waiting or not hasattr(manager, "scoring"):
            return inner(self, *args, **kwargs)
        found: dict[str, Any] = {}
        try:
            for request_id in list(waiting):
                lora = getattr(self.requests.get(request_id), "lora_request", None)
                self.num_prompt_logprobs = alone = {request_id: waiting[request_id]}
                with manager.scoring(lora.lora_int_id if lora is not None else 0):
                    found |= inner(self, *args, **kwargs)
                if not alone:  # vLLM is done with it
                    del waiting[request_id]
        finally:
            self.num_prompt_logprobs = waiting
        return found

    return scored


def _v1_chunks(runner: Any, num_scheduled_tokens: Any, prepared: Any) -> Iterator[Chunk]:
    """V1: rows follow the order of the persistent batch; its second argument counts them."""
    batch = runner.input_batch
    row = 0
    for i, request_id in enumerate(batch.req_ids):
        count = int(num_scheduled_tokens[i])
        yield Chunk(request_id, row, int(batch.num_computed_tokens_cpu[i]), count)
        row += count


def _v2_chunks(runner: Any, batch_req_state: Any, prepared: Any) -> Iterator[Chunk]:
    """V2: the prepared batch of the step says it all."""
    for i, request_id in enumerate(prepared.req_ids):
        row, end = int(prepared.query_start_loc_np[i]), int(prepared.query_start_loc_np[i + 1])
        yield Chunk(request_id, row, int(prepared.num_computed_tokens_np[i]), end - row)
