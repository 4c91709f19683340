"""`deltaworks bench gateway`: what our HTTP side costs, against vLLM's own server on the same engine settings and load.

start      both servers, in child processes
load       closed loops and a Poisson process, round by round, the servers in turn
overload   our server alone: many deltas over few places, beside as many deltas as there are places
tell       the table
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from compressors.base import resolve_base
from server.bench.http_load import HttpLoad, Round, percentile, run_load, zipf
from server.bench.http_servers import Served, cpu_seconds, engine_settings, gateway_server, upload_all, vllm_server
from server.bench.report import BenchError, Measurement, reported
from server.bench.serve import delta_files, make_deltas
from server.config import Settings

BASE = "base"  # its name at both servers
PLACES, DELTAS = 8, 64
OVER, WITHIN = f"Zipf over {DELTAS} deltas, {PLACES} places", f"Zipf over {PLACES} deltas, {PLACES} places"
_POISSON_SHARE = 0.7  # of what vLLM's server answers in a closed loop, where no rate is given
_OVER_CLIENTS = 16


@dataclass(frozen=True)
class Figure:
    """A number of the rounds of one load: name, unit, and how it is found."""

    name: str
    unit: str
    value: float


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write JSON where asked."""
    return reported(args.json, lambda: _measured(args))


def _measured(args: argparse.Namespace) -> list[Measurement]:
    base, sources = resolve_base(args.base), delta_files(args.deltas) if args.zipf else []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deltaworks-bench-")))
        print("starting two servers ...", file=sys.stderr)
        settings = Settings(engine=engine_settings(args, PLACES))
        servers = {
            "gateway": stack.enter_context(gateway_server(base, settings, folder, BASE)),
            "vLLM's server": stack.enter_context(vllm_server(base, args, folder, BASE, PLACES)),
        }
        for served in servers.values():
            served.wait_ready()
        rows = compared(asyncio.run(_rounds(servers, _loads(args), args.repeats)))
        if args.zipf:
            deltas = (Path(one.path) for one in make_deltas(sources, folder, DELTAS))
            names = upload_all(servers["gateway"], tqdm(deltas, desc="uploading", unit="delta", total=DELTAS))
            rows += beside(asyncio.run(_over_places(servers["gateway"], names, args)))
    return rows


def _loads(args: argparse.Namespace) -> list[HttpLoad]:
    """A load of `clients` has two requests of each at least; the last is the Poisson one."""

    def load(name: str, count: int, clients: int | None) -> HttpLoad:
        return HttpLoad(name, (BASE,) * count, args.prompt_tokens, args.tokens, clients, args.rate)

    closed = [load(f"{n} client{'s'[: n > 1]}", max(args.requests, 2 * n), n) for n in args.clients]
    return [*closed, load("Poisson", 4 * args.requests, None)]


async def _rounds(
    servers: dict[str, Served], loads: Sequence[HttpLoad], repeats: int
) -> dict[str, dict[str, list[Round]]]:
    """load -> server -> rounds, the servers in turn and first by turns; one round before is warm-up."""
    found: dict[str, dict[str, list[Round]]] = {}
    rate = next(load.rate for load in loads)
    with tqdm(total=(repeats + 1) * len(loads) * len(servers), desc="measuring", unit="run") as bar:
        for turn in range(repeats + 1):
            for load in loads:
                if load.clients is None and rate is None:
                    rate = _POISSON_SHARE * max(made[-1].requests_per_s for made in found["vLLM's server"].values())
                asked = load if load.clients is not None else replace(load, rate=rate)
                names = list(servers)[:: -1 if turn % 2 else 1]
                for name in names:
                    made = await _round(servers[name], asked, turn)
                    rounds = found.setdefault(name, {}).setdefault(_titled(asked), [])
                    rounds.append(made)
                    bar.update()
    return {name: {load: rounds[1:] for load, rounds in loads.items()} for name, loads in found.items()}


def _titled(load: HttpLoad) -> str:
    return load.name if load.clients is not None else f"{load.name}, {load.rate:.2f} a second"


async def _round(served: Served, load: HttpLoad, seed: int) -> Round:
    before = cpu_seconds(served.child.process.pid)
    made = await run_load(served.child.url, load, seed)
    if not made.answered:
        raise BenchError(f"{served.child.url} answered nothing of {load.name}: {made.asked[0].error}")
    return replace(made, cpu_s=cpu_seconds(served.child.process.pid) - before)


async def _over_places(served: Served, names: Sequence[str], args: argparse.Namespace) -> dict[str, list[Round]]:
    found: dict[str, list[Round]] = {WITHIN: [], OVER: []}
    for turn in range(args.repeats + 1):
        for title, among in ((WITHIN, names[:PLACES]), (OVER, names)):
            models = zipf(among, max(4 * args.requests, 2 * _OVER_CLIENTS), turn)
            load = HttpLoad(title, models, args.prompt_tokens, args.tokens, _OVER_CLIENTS)
            found[title].append(await _round(served, load, turn))
    return {title: rounds[1:] for title, rounds in found.items()}


def figures(rounds: Sequence[Round]) -> list[Figure]:
    """Rates are medians of the rounds, times percentiles over the requests of all rounds."""
    answered = [one for made in rounds for one in made.answered]
    tokens = sum(one.tokens for one in answered)
    ttft = [1000 * one.ttft_s for one in answered]
    gaps = [1000 * gap for one in answered for gap in one.gaps_s]
    total = [1000 * one.total_s for one in answered]
    return [
        Figure("requests", "req/s", statistics.median(made.requests_per_s for made in rounds)),
        Figure("output", "tok/s", statistics.median(made.tokens_per_s for made in rounds)),
        *(Figure(f"first token p{p}", "ms", percentile(ttft, p)) for p in (50, 95, 99)),
        *(Figure(f"between tokens p{p}", "ms", percentile(gaps, p)) for p in (50, 95, 99)),
        *(Figure(f"whole answer p{p}", "ms", percentile(total, p)) for p in (50, 99)),
        Figure("CPU", "ms/tok", 1000 * sum(made.cpu_s for made in rounds) / tokens if tokens else float("nan")),
        Figure("errors", "", float(sum(len(made.asked) - len(made.answered) for made in rounds))),
    ]


def compared(found: dict[str, dict[str, list[Round]]]) -> list[Measurement]:
    """Every load's figures of both servers, ours over vLLM's."""
    ours, theirs = found["gateway"], found["vLLM's server"]
    rows = []
    for load, rounds in ours.items():
        for mine, rival in zip(figures(rounds), figures(theirs[load]), strict=True):
            name = f"{load}: {mine.name}"
            rows.append(Measurement(f"vLLM's server, {name}", rival.value, rival.unit))
            rows.append(_over(f"gateway, {name}", mine, rival, "vLLM's server"))
    return rows


def beside(found: dict[str, list[Round]]) -> list[Measurement]:
    """The load over the places, over the one within."""
    within, over = figures(found[WITHIN]), figures(found[OVER])
    rows = [Measurement(f"{WITHIN}: {one.name}", one.value, one.unit) for one in within]
    return rows + [_over(f"{OVER}: {one.name}", one, rival, WITHIN) for one, rival in zip(over, within, strict=True)]


def _over(name: str, mine: Figure, rival: Figure, title: str) -> Measurement:
    if not rival.value or not mine.unit:
        return Measurement(name, mine.value, mine.unit)
    return Measurement(name, mine.value, mine.unit, mine.value / rival.value, title)
