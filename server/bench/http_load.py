"""The client of the benches over HTTP: streamed completions of fixed lengths, from so many clients, or as they arrive."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
import numpy as np

from server.bench.contenders import prompt_ids

_TIMEOUT_S = 120


@dataclass(frozen=True)
class HttpLoad:
    """Requests in order: the model of each. Either `clients` ask one after the other, or requests arrive as a Poisson process."""

    name: str
    models: tuple[str, ...]
    prompt_tokens: int
    tokens: int
    clients: int | None = None
    rate: float | None = None  # requests per second

    def arrivals_s(self, seed: int) -> list[float]:
        """When each request starts, from the start of the load."""
        if self.rate is None:
            return [0.0] * len(self.models)
        gaps: list[float] = np.random.default_rng(seed).exponential(1 / self.rate, len(self.models)).tolist()
        return list(itertools.accumulate(gaps))


@dataclass(frozen=True)
class Asked:
    """One request. `error` says why there is no answer; the times then mean nothing."""

    ttft_s: float = 0.0
    total_s: float = 0.0
    gaps_s: tuple[float, ...] = ()  # between the chunks that carry tokens
    tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Round:
    """One run of a load."""

    seconds: float
    asked: tuple[Asked, ...]
    cpu_s: float = field(default=0.0)  # of the server's processes

    @property
    def answered(self) -> list[Asked]:
        return [one for one in self.asked if one.error is None]

    @property
    def requests_per_s(self) -> float:
        return len(self.answered) / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return sum(one.tokens for one in self.asked) / self.seconds


async def run_load(url: str, load: HttpLoad, seed: int) -> Round:
    """Ask everything once. Prompts never share a prefix, so the prefix cache does not enter the figures."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=load.clients)
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, limits=limits) as client:
        started = time.perf_counter()
        permits = asyncio.Semaphore(load.clients or len(load.models))

        async def ask(number: int, arrival_s: float) -> Asked:
            await asyncio.sleep(max(0.0, started + arrival_s - time.perf_counter()))
            async with permits:  # first come, first served: the order of the load
                return await _ask(client, load, number, seed)

        asked = await asyncio.gather(*(ask(i, arrival) for i, arrival in enumerate(load.arrivals_s(seed))))
        return Round(time.perf_counter() - started, tuple(asked))


async def _ask(client: httpx.AsyncClient, load: HttpLoad, number: int, seed: int) -> Asked:
    body = {
        "model": load.models[number],
        "prompt": prompt_ids(number, seed, load.prompt_tokens),
        "max_tokens": load.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    times: list[float] = []
    tokens = 0
    try:
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code != 200:
                return Asked(error=f"{reply.status_code}: {(await reply.aread())[:200]!r}")
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    return Asked(error=str(chunk["error"])[:200])
                if chunk["choices"]:
                    times.append(time.perf_counter())
                if usage := chunk.get("usage"):
                    tokens = usage["completion_tokens"]
    except httpx.HTTPError as error:
        return Asked(error=f"{type(error).__name__}: {error}")
    if tokens != load.tokens:
        return Asked(error=f"{tokens} tokens came, not {load.tokens}")
    gaps = tuple(after - before for before, after in itertools.pairwise(times))
    return Asked(times[0] - started, time.perf_counter() - started, gaps, tokens)


def percentile(values: Sequence[float], percent: float) -> float:
    """NaN without values."""
    return float(np.percentile(values, percent)) if values else float("nan")


def zipf(names: Sequence[str], count: int, seed: int, exponent: float = 1.0) -> tuple[str, ...]:
    """`count` names, the k-th with a probability that falls as k^-exponent."""
    weights = np.arange(1, len(names) + 1, dtype=np.float64) ** -exponent
    picked = np.random.default_rng(seed).choice(len(names), count, p=weights / weights.sum())
    return tuple(names[int(i)] for i in picked)
