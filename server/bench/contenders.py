"""The engines that are compared: bare vLLM, vLLM with our delta plane, and vLLM with its own LoRA. All stay up during a run."""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from server.config import EngineSettings
from server.core import Sampling
from server.engine.arguments import engine_arguments
from server.engine.base import EngineDelta, EngineEdit
from server.engine.vllm import VLLMEngine

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

LORA_RANK = 16
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Load:
    """A closed batch: one row per entry of `adapters`, all started together, all of the same length.

    What counts is the tokens that are generated; for a single one, those of the prompt (a measure of prefill).
    """

    adapters: tuple[Any, ...]
    max_tokens: int
    edit: EngineEdit | None = None  # of every row; only our engine knows edits
    prompt_tokens: int = PROMPT_TOKENS

    @property
    def tokens(self) -> int:
        return len(self.adapters) * (self.max_tokens if self.max_tokens > 1 else self.prompt_tokens)


def prompt_ids(row: int, seed: int, count: int) -> list[int]:
    """Rows never share a prefix, so the prefix cache does not enter the figures."""
    generator = np.random.default_rng((seed, row))
    tokens: list[int] = generator.integers(1000, 40_000, count).tolist()
    return tokens


async def _timed(load: Load, row: Callable[[int, Any, Load], Awaitable[None]]) -> float:
    """Run all rows of a load at once; tokens per second over the whole batch."""
    started = time.perf_counter()
    await asyncio.gather(*(row(i, adapter, load) for i, adapter in enumerate(load.adapters)))
    return load.tokens / (time.perf_counter() - started)


class Ours:
    """Our engine with `deltas` resident; an adapter of a Load is an EngineDelta, or None for the base."""

    def __init__(self, engine: VLLMEngine, delta_bytes: Sequence[int]) -> None:
        self.engine = engine
        self.delta_bytes = delta_bytes  # in execution form
        self._runs = 0

    async def tokens_per_s(self, load: Load) -> float:
        self._runs += 1
        return await _timed(load, self._row)

    async def _row(self, row: int, delta: EngineDelta | None, load: Load) -> None:
        sampling = Sampling(max_tokens=load.max_tokens, temperature=0.0, ignore_eos=True)
        stream = self.engine.generate(
            f"{self._runs}-{row}", prompt_ids(row, self._runs, load.prompt_tokens), sampling, delta, None, load.edit
        )
        async with aclosing(stream):
            async for _ in stream:
                pass


class Stock:
    """vLLM without our plugin; an adapter of a Load is vLLM's own LoRARequest, or None."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._runs = 0

    async def tokens_per_s(self, load: Load) -> float:
        self._runs += 1
        return await _timed(load, self._row)

    async def _row(self, row: int, adapter: Any, load: Load) -> None:
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        sampling = SamplingParams(
            max_tokens=load.max_tokens, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        prompt = TokensPrompt(prompt_token_ids=prompt_ids(row, self._runs, load.prompt_tokens))
        stream = self._llm.generate(prompt, sampling, f"{self._runs}-{row}", lora_request=adapter)
        async with aclosing(stream):
            async for _ in stream:
                pass


@asynccontextmanager
async def ours(base: Path, settings: EngineSettings, deltas: Sequence[EngineDelta]) -> AsyncIterator[Ours]:
    engine = VLLMEngine(base, settings)
    try:
        await engine.start()
        yield Ours(engine, [await engine.load(delta) for delta in deltas])
    finally:
        await engine.stop()


def base_bytes(base: Path, dtype: str) -> int:
    """Bytes of the base's weights, all of which a decode step reads (an embedding that is tied is the head)."""
    from safetensors import safe_open

    numbers = 0
    for file in base.glob("*.safetensors"):
        with safe_open(file, "np") as weights:
            numbers += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118  # no mapping
    return numbers * (4 if dtype == "float32" else 2)


@asynccontextmanager
async def bare(base: Path, settings: EngineSettings) -> AsyncIterator[Stock]:
    """vLLM with the same settings, without adapters and without our plugin."""
    dropped = ("enable_lora", "max_loras", "max_cpu_loras", "worker_extension_cls", "additional_config", "hf_overrides")
    async with _stock({k: v for k, v in engine_arguments(base, settings).items() if k not in dropped}) as llm:
        yield Stock(llm)


@asynccontextmanager
async def stock_lora(base: Path, settings: EngineSettings, folder: Path) -> AsyncIterator[tuple[Stock, list[Any]]]:
    """vLLM's own LoRA with `deltas_per_batch` random adapters of rank 16 on every projection, loaded."""
    from vllm.lora.request import LoRARequest

    dropped = ("worker_extension_cls", "additional_config", "hf_overrides")
    arguments = {k: v for k, v in engine_arguments(base, settings).items() if k not in dropped}
    count = settings.deltas_per_batch
    arguments |= {"max_lora_rank": LORA_RANK, "max_cpu_loras": count}
    requests = [LoRARequest(f"lora-{i}", i + 1, str(_random_lora(base, folder / f"lora-{i}", i))) for i in range(count)]
    async with _stock(arguments) as llm:
        for request in requests:
            await llm.add_lora(request)
        yield Stock(llm), requests


@asynccontextmanager
async def _stock(arguments: dict[str, Any]) -> AsyncIterator[AsyncLLM]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    before = os.environ.get("VLLM_PLUGINS")
    os.environ["VLLM_PLUGINS"] = ""  # read by the child process: no plugin there
    try:
        llm = await asyncio.to_thread(
            lambda: AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments, disable_log_stats=True))
        )
    finally:
        if before is None:
            del os.environ["VLLM_PLUGINS"]
        else:
            os.environ["VLLM_PLUGINS"] = before
    try:
        yield llm
    finally:
        await asyncio.to_thread(llm.shutdown)


def _random_lora(base: Path, folder: Path, seed: int) -> Path:
    """A PEFT adapter folder with small random factors."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    generator = np.random.default_rng(seed)
    tensors, leaves = {}, set()
    with safe_open(base / "model.safetensors", "np") as weights:
        for name in weights.keys():  # noqa: SIM118  # safe_open is no mapping
            if ".self_attn." in name or ".mlp." in name:
                out, size = weights.get_slice(name).get_shape()
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{stem}.lora_A.weight"] = generator.normal(0, 0.02, (LORA_RANK, size)).astype(np.float32)
                tensors[f"{stem}.lora_B.weight"] = generator.normal(0, 0.02, (out, LORA_RANK)).astype(np.float32)
                leaves.add(name.split(".")[-2])
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": LORA_RANK,
        "lora_alpha": LORA_RANK,
        "target_modules": sorted(leaves),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
