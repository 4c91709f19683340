"""Drives the real engine from plain tests: rows in, tokens and logprobs out."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.config import EngineSettings
from server.core import Sampling, TokenEvent
from server.engine.base import EditReport, EngineDelta, EngineEdit, EngineStep
from server.engine.vllm import VLLMEngine

KV_BYTES = 64 << 20


@dataclass(frozen=True)
class Row:
    """One request of a truth test: what to ask whom."""

    prompt: tuple[int, ...]
    delta: EngineDelta | None = None
    cache_salt: str | None = None
    edit: EngineEdit | None = None


@dataclass(frozen=True)
class Answer:
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    cached: int
    report: EditReport | None = None


class Runner:
    """The engine on an event loop of its own, for tests that read top to bottom."""

    def __init__(
        self, base: Path, settings: EngineSettings, own_tokenizer: Callable[[EngineDelta], Any] = lambda delta: None
    ) -> None:
        self.loop = asyncio.new_event_loop()
        self.engine = VLLMEngine(base, settings, own_tokenizer)
        self.steps: list[EngineStep] = []
        self.engine.watch(self.steps.append)
        self.loop.run_until_complete(self.engine.start())
        self._count = 0

    @property
    def preemptions(self) -> int:
        """How often a row had to give its cache up, so far."""
        return sum(step.preemptions for step in self.steps)

    def load(self, delta: EngineDelta) -> int:
        return self.loop.run_until_complete(self.engine.load(delta))

    def unload(self, delta: EngineDelta) -> None:
        self.loop.run_until_complete(self.engine.unload(delta))

    def load_edit(self, edit: EngineEdit) -> None:
        self.loop.run_until_complete(self.engine.load_edit(edit))

    def unload_edit(self, edit: EngineEdit) -> None:
        self.loop.run_until_complete(self.engine.unload_edit(edit))

    def answer(self, rows: list[Row], max_tokens: int = 24) -> list[Answer]:
        """All rows at once, greedy, with the logprob of every chosen token and, at the end, the report of an edit."""
        return self.loop.run_until_complete(self._answer(rows, max_tokens))

    def choices(self, row: Row, max_tokens: int, n: int) -> list[Answer]:
        """n children of one request, each greedy (vLLM refuses temperature 0 with n > 1); all have the same report."""
        sampling = Sampling(max_tokens=max_tokens, top_k=1, logprobs=0, ignore_eos=True, n=n)
        return self.loop.run_until_complete(self._generate(row, sampling))

    def sampled(self, row: Row, sampling: Sampling) -> list[Answer]:
        """One row under settings of the test's own."""
        return self.loop.run_until_complete(self._generate(row, sampling))

    def events(self, row: Row, sampling: Sampling) -> list[TokenEvent]:
        """All that one row answers."""
        return self.loop.run_until_complete(self.collect(row, sampling))

    async def collect(self, row: Row, sampling: Sampling) -> list[TokenEvent]:
        self._count += 1
        stream = self.engine.generate(f"row-{self._count}", row.prompt, sampling, row.delta, row.cache_salt, row.edit)
        async with aclosing(stream):
            return [event async for event in stream]

    async def _answer(self, rows: list[Row], max_tokens: int) -> list[Answer]:
        return list(await asyncio.gather(*(self._one(row, max_tokens) for row in rows)))

    async def _one(self, row: Row, max_tokens: int) -> Answer:
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0, logprobs=0, ignore_eos=True)
        return (await self._generate(row, sampling))[0]

    async def _generate(self, row: Row, sampling: Sampling) -> list[Answer]:
        self._count += 1
        request_id = f"row-{self._count}"
        tokens: list[list[int]] = [[] for _ in range(sampling.n)]
        logprobs: list[list[float]] = [[] for _ in range(sampling.n)]
        cached = [0] * sampling.n
        stream = self.engine.generate(request_id, row.prompt, sampling, row.delta, row.cache_salt, row.edit)
        async with aclosing(stream):
            async for event in stream:
                tokens[event.index] += event.token_ids
                logprobs[event.index] += [entry.logprob for entry in event.logprobs or ()]
                cached[event.index] = event.cached_tokens
        report = await self.engine.edit_report(request_id) if row.edit else None
        return [Answer(tuple(t), tuple(p), c, report) for t, p, c in zip(tokens, logprobs, cached, strict=True)]

    def stop(self) -> None:
        self.loop.run_until_complete(self.engine.stop())
        self.loop.close()


@contextmanager
def running(base: Path, deltas: Sequence[EngineDelta], **changes: object) -> Iterator[Runner]:
    """An engine with all of the deltas resident; `changes` are to its settings."""
    runner = Runner(base, engine_settings(**changes))
    try:
        for delta in deltas:
            runner.load(delta)
        yield runner
    finally:
        runner.stop()


def engine_settings(**changes: object) -> EngineSettings:
    values = {"dtype": "float32", "kv_cache_bytes": KV_BYTES, "max_num_seqs": 16, "max_model_len": 512, "threads": 1}
    return EngineSettings.model_validate(values | changes)
