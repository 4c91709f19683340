"""`deltaworks bench soak`: what a gateway holds, gives back and survives.

idle     many open streams that wait for their turn: memory of the HTTP process
cycles   a delta loaded and unloaded again and again: memory of all processes
load     every row taken, and clients that leave in the middle: how soon readiness answers, how soon a leaver's rows are free
mixed    for minutes: base and deltas, streamed or not, uploads, alias moves, clients that leave or are killed: what went wrong
"""

from __future__ import annotations

import argparse
import asyncio
import math
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from compressors.base import resolve_base
from server.bench.http_load import HttpLoad, Round, percentile, run_load
from server.bench.http_servers import Served, engine_settings, gateway_server, resident_mib, upload_all
from server.bench.report import BenchError, Measurement, reported
from server.bench.serve import delta_files, make_deltas
from server.bench.traffic import Traffic
from server.config import AdmissionSettings, Settings
from server.demo_calls import expect

BASE = "base"
_DELTAS, _VERSIONS, _PLACES = 6, 2, 4  # deltas that are asked, versions of one that moves, places for them
_WARM_CYCLES = 20
_SETTLE_S, _POLL_S, _SETTLE_TRIES = 2.0, 0.1, 600
_CANCEL = "deltaworks_cancel_latency_seconds"


@dataclass(frozen=True)
class Memory:
    """Resident memory in MiB: of the HTTP process, and of all processes of its session."""

    http: float
    all: float


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write JSON where asked. 1 where an answer was wrong."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4 * args.streams), hard), hard))  # the child inherits it
    faults: list[str] = []
    status = reported(args.json, lambda: _measured(args, faults))
    for fault in faults[:10]:
        print(f"fault: {fault}", file=sys.stderr)
    return 1 if faults else status


def _measured(args: argparse.Namespace, faults: list[str]) -> list[Measurement]:
    """What was wrong is added to `faults`."""
    base, sources = resolve_base(args.base), delta_files(args.deltas)
    with tempfile.TemporaryDirectory(prefix="deltaworks-bench-") as name:
        folder = Path(name)
        print("starting the gateway ...", file=sys.stderr)
        room = AdmissionSettings(max_concurrent=args.streams + 256, max_queued_tokens=1 << 22)
        settings = Settings(engine=engine_settings(args, _PLACES), admission=room)
        with gateway_server(base, settings, folder, BASE) as served:
            served.wait_ready()
            deltas = [Path(one.path) for one in make_deltas(sources, folder, _DELTAS + _VERSIONS)]
            names = upload_all(served, deltas[_VERSIONS:])
            rows, found = asyncio.run(_phases(served, names, deltas[:_VERSIONS], args))
    faults += found
    return rows


async def _phases(
    served: Served, names: Sequence[str], deltas: Sequence[Path], args: argparse.Namespace
) -> tuple[list[Measurement], list[str]]:
    # Prompts of every model once, so that what is allocated once is there before anything is measured.
    warm = await run_load(served.child.url, HttpLoad("warm-up", (BASE, *names) * 2, 16, 8, 8), 0)
    faults = [f"warm-up: {one.error}" for one in warm.asked if one.error]
    rows = await _idle(served, args)
    rows += await _cycles(served, names[0], args)
    loaded, more = await _load(served, args)
    mixed, last = await _mixed(served, names, deltas, args)
    return rows + loaded + mixed, faults + more + last


async def _idle(served: Served, args: argparse.Namespace) -> list[Measurement]:
    """The first rows generate for as long as the context lets them; the others wait for their turn, and nothing is sent."""
    body = {"model": BASE, "prompt": [1, 2, 3], "max_tokens": 1000, "ignore_eos": True, "stream": True}
    before = memory(served)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=served.child.url, timeout=None, limits=limits) as client:

        async def stream() -> None:
            while True:  # one that came to its end is opened again
                async with client.stream("POST", "/v1/completions", json=body) as reply:
                    said = await reply.aread()
                if reply.status_code != 200:
                    raise BenchError(f"a stream was refused: {reply.status_code} {said[:200]!r}")

        streams = [asyncio.ensure_future(stream()) for _ in range(args.streams)]
        with tqdm(total=args.streams, desc="opening streams", unit="stream") as bar:
            while bar.n < args.streams:
                for one in streams:
                    if one.done():
                        one.result()
                bar.update((await _scraped(served)).in_flight - bar.n)
                await asyncio.sleep(_POLL_S)
        await asyncio.sleep(_SETTLE_S)
        held, in_flight = memory(served), (await _scraped(served)).in_flight
        for one in streams:
            one.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    await _idle_again(served)
    return [
        Measurement("idle streams: open", in_flight, ""),
        Measurement("idle streams: added to the HTTP process", held.http - before.http, "MiB"),
        Measurement("idle streams: added to all processes", held.all - before.all, "MiB"),
    ]


async def _cycles(served: Served, name: str, args: argparse.Namespace) -> list[Measurement]:
    sizes: list[float] = []
    async with httpx.AsyncClient(base_url=served.child.url, headers=served.child.admin_headers, timeout=60) as client:
        for _ in tqdm(range(_WARM_CYCLES + args.cycles), desc="loading and unloading", unit="cycle"):
            for action in ("load", "unload"):
                expect(await client.post(f"/v1/admin/deltas/{name}/{action}"), (200,))
            sizes.append(memory(served).all)
    first, last = sizes[_WARM_CYCLES - 1], sizes[-1]
    return [Measurement(f"{args.cycles} load/unload cycles: memory after", last, "MiB", last / first, "before")]


async def _load(served: Served, args: argparse.Namespace) -> tuple[list[Measurement], list[str]]:
    load = HttpLoad("full", (BASE,) * (args.clients * 4), 64, 64, args.clients)
    before = await _scraped(served)
    running = asyncio.ensure_future(run_load(served.child.url, load, 1))
    traffic = Traffic(served.child, [BASE], [])
    probing = asyncio.ensure_future(traffic.probes(lambda: running.done()))
    leaving = asyncio.ensure_future(traffic.leavers(lambda: running.done(), tokens=256))
    made: Round = await running
    await asyncio.gather(probing, leaving)
    await _idle_again(served)
    step_ms = percentile([1000 * gap for one in made.answered for gap in one.gaps_s], 50)
    cancel_ms = 1000 * quantile(0.95, before.cancels, (await _scraped(served)).cancels)
    ready = traffic.probe_ms
    rows = [
        Measurement("full load: readiness p50", percentile(ready, 50), "ms"),
        Measurement("full load: readiness, the slowest", max(ready), "ms"),
        Measurement("full load: a decode step", step_ms, "ms"),
        Measurement("full load: rows of a leaver free, p95", cancel_ms, "ms", cancel_ms / step_ms, "a decode step"),
        Measurement("full load: clients that left", traffic.left, ""),
    ]
    return rows, [*(f"full load: {one.error}" for one in made.asked if one.error), *traffic.faults]


async def _mixed(
    served: Served, names: Sequence[str], deltas: Sequence[Path], args: argparse.Namespace
) -> tuple[list[Measurement], list[str]]:
    traffic = Traffic(served.child, [BASE, *names], deltas)
    before, seconds = memory(served), round(60 * args.minutes)
    end = time.monotonic() + seconds
    with tqdm(total=seconds, desc="mixed load", unit="s") as bar:
        running = asyncio.ensure_future(traffic.everything(lambda: time.monotonic() >= end, args.clients))
        while not running.done():
            await asyncio.wait([running], timeout=1)
            bar.update(min(seconds - bar.n, 1))
            bar.set_postfix(answers=traffic.answered, faults=len(traffic.faults))
        await running
    await _idle_again(served)
    after = memory(served)
    counted = {
        "answers": traffic.answered,
        "uploads and alias moves": traffic.moved,
        "clients that left": traffic.left,
        "clients killed": traffic.killed,
        "errors": len(traffic.faults),
    }
    title = f"{args.minutes:g} minutes mixed"
    return [
        *(Measurement(f"{title}: {name}", count, "") for name, count in counted.items()),
        Measurement(f"{title}: readiness, the slowest", max(traffic.probe_ms), "ms"),
        Measurement(f"{title}: memory after", after.all, "MiB", after.all / before.all, "before"),
    ], traffic.faults


async def _idle_again(served: Served) -> None:
    """Return when nothing is in flight. Raises BenchError."""
    for _ in range(_SETTLE_TRIES):
        if not (await _scraped(served)).in_flight:
            return
        await asyncio.sleep(_POLL_S)
    raise BenchError(f"requests are in flight {_SETTLE_TRIES * _POLL_S:.0f} s after their clients left")


def memory(served: Served) -> Memory:
    sizes = resident_mib(served.child.process.pid)
    return Memory(sizes[served.child.process.pid], sum(sizes.values()))


@dataclass(frozen=True)
class Scrape:
    """What the bench reads of /metrics: generations in flight, and how long cancelling took: counts up to each edge, in seconds."""

    in_flight: float
    cancels: dict[float, float]


async def _scraped(served: Served) -> Scrape:
    async with httpx.AsyncClient(base_url=served.child.url, headers=served.child.admin_headers) as client:
        reply = await client.get("/metrics", timeout=60)
        expect(reply, (200,))
    samples = [one for family in text_string_to_metric_families(reply.text) for one in family.samples]
    return Scrape(
        sum(one.value for one in samples if one.name == "deltaworks_requests_in_flight"),
        {float(one.labels["le"]): one.value for one in samples if one.name == f"{_CANCEL}_bucket"},
    )


def quantile(share: float, before: dict[float, float], after: dict[float, float]) -> float:
    """Of what a histogram counted between two scrapes, interpolated within its bucket, as Prometheus does."""
    grown = {edge: after[edge] - before.get(edge, 0.0) for edge in sorted(after)}
    wanted, low, below = share * max(grown.values(), default=0.0), 0.0, 0.0
    if not wanted:
        return float("nan")
    for edge, count in grown.items():
        if count >= wanted:
            return low if math.isinf(edge) else low + (edge - low) * (wanted - below) / (count - below)
        low, below = edge, count
    raise AssertionError("the last bucket holds all")
