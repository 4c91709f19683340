"""`deltaworks bench serve`: what the delta plane costs, against bare vLLM and against vLLM's own LoRA, in one run."""

from __future__ import annotations

import argparse
import asyncio
import functools
import hashlib
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from compressors.artifact import Artifact
from compressors.base import resolve_base
from compressors.writer import ArtifactWriter
from server.bench.cold import cold_times
from server.bench.contenders import LORA_RANK, Load, bare, base_bytes, ours, stock_lora
from server.bench.report import BenchError, Measurement, reported
from server.config import EngineSettings
from server.engine.base import EngineDelta

BATCH = 8
DISTINCT = (1, 2, 4, 8)
PREFILL = 512  # tokens of a prompt whose first token is timed


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write JSON where asked."""
    return reported(args.json, lambda: _measured(args))


def _measured(args: argparse.Namespace) -> list[Measurement]:
    base, sources = resolve_base(args.base), delta_files(args.deltas)
    with tempfile.TemporaryDirectory(prefix="deltaworks-bench-") as folder:
        deltas = make_deltas(sources, Path(folder), BATCH + args.cold_repeats)
        rows = asyncio.run(_throughput(base, deltas[:BATCH], Path(folder), args))
        return rows + cold_times(args.base, deltas[BATCH:], args.dtype)


def delta_files(folder: Path) -> list[Path]:
    """Raises BenchError where there is none."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise BenchError(f"{folder} holds no delta (.safetensors); name a folder with --deltas")
    return found


def make_deltas(sources: list[Path], folder: Path, count: int) -> list[EngineDelta]:
    """`count` distinct deltas with the cost of real ones: the given files with other mask seeds."""
    deltas = []
    for i in range(count):
        path = folder / f"delta-{i}.safetensors"
        with Artifact.open(sources[i % len(sources)]) as artifact, ArtifactWriter(path) as writer:
            for key, slot in artifact.slots.items():
                writer.add(key, artifact.array(key), bf16=slot.dtype == "BF16")
            writer.finish(artifact.manifest.model_copy(update={"seed": 1000 + i}), artifact.path.stat().st_size)
        deltas.append(EngineDelta(hashlib.sha256(path.read_bytes()).hexdigest(), str(path)))
    return deltas


def engine_settings(args: argparse.Namespace) -> EngineSettings:
    """The same engine for every contender of a bench."""
    return EngineSettings(
        dtype=args.dtype,
        max_model_len=1024,
        kv_cache_bytes=256 << 20,
        max_num_seqs=16,
        deltas_per_batch=BATCH,
        threads=args.threads,
    )


async def _throughput(
    base: Path, deltas: list[EngineDelta], folder: Path, args: argparse.Namespace
) -> list[Measurement]:
    settings = engine_settings(args)
    async with AsyncExitStack() as stack:
        print("starting three engines ...", file=sys.stderr)
        plain = await stack.enter_async_context(bare(base, settings))
        plane = await stack.enter_async_context(ours(base, settings, deltas))
        lora, adapters = await stack.enter_async_context(stock_lora(base, settings, folder))

        def load(*used: object) -> Load:
            return Load(tuple(used), args.tokens)

        def spread(distinct: int) -> Awaitable[float]:
            return plane.tokens_per_s(load(*(deltas[i % distinct] for i in range(BATCH))))

        cases: dict[str, Callable[[], Awaitable[float]]] = {
            "bare vLLM, batch 8": lambda: plain.tokens_per_s(load(*[None] * BATCH)),
            "base only, batch 8": lambda: plane.tokens_per_s(load(*[None] * BATCH)),
            **{f"{n} distinct deltas, batch 8": functools.partial(spread, n) for n in DISTINCT},
            "bare vLLM, batch 1": lambda: plain.tokens_per_s(load(None)),
            "base only, batch 1": lambda: plane.tokens_per_s(load(None)),
            "one delta, batch 1": lambda: plane.tokens_per_s(load(deltas[0])),
            f"base only, prefill of {PREFILL}": lambda: plane.tokens_per_s(Load((None,), 1, None, PREFILL)),
            f"one delta, prefill of {PREFILL}": lambda: plane.tokens_per_s(Load((deltas[0],), 1, None, PREFILL)),
            "stock LoRA engine, base only, batch 8": lambda: lora.tokens_per_s(load(*[None] * BATCH)),
            f"stock LoRA rank {LORA_RANK}, 8 adapters, batch 8": lambda: lora.tokens_per_s(load(*adapters)),
        }
        found = await interleaved(cases, args.repeats)
        return _rows(found, base_bytes(base, args.dtype), statistics.mean(plane.delta_bytes))


async def interleaved(cases: dict[str, Callable[[], Awaitable[float]]], repeats: int) -> dict[str, float]:
    """Median of every case over rounds that run each case once; one round before is warm-up."""
    from tqdm import tqdm

    found: dict[str, list[float]] = {name: [] for name in cases}
    with tqdm(total=(repeats + 1) * len(cases), desc="measuring", unit="run") as bar:
        for turn in range(repeats + 1):
            for name, case in cases.items():
                value = await case()
                if turn:
                    found[name].append(value)
                bar.update()
    return {name: statistics.median(values) for name, values in found.items()}


def _rows(found: dict[str, float], base_size: float, delta_size: float) -> list[Measurement]:
    rivals = {
        "base only, batch 8": "bare vLLM, batch 8",
        **{f"{n} distinct deltas, batch 8": "base only, batch 8" for n in DISTINCT},
        "base only, batch 1": "bare vLLM, batch 1",
        "one delta, batch 1": "base only, batch 1",
        f"one delta, prefill of {PREFILL}": f"base only, prefill of {PREFILL}",
        "stock LoRA engine, base only, batch 8": "bare vLLM, batch 8",
        f"stock LoRA rank {LORA_RANK}, 8 adapters, batch 8": "stock LoRA engine, base only, batch 8",
    }
    distinct = {f"{n} distinct deltas, batch 8": n for n in DISTINCT} | {"one delta, batch 1": 1}
    bounds = {name: base_size / (base_size + n * delta_size) for name, n in distinct.items()}
    rows = []
    for name, value in found.items():
        rival = rivals.get(name)
        ratio = value / found[rival] if rival else None
        rows.append(Measurement(name, value, "tok/s", ratio, rival, bounds.get(name)))
    return [*rows, Measurement("delta in memory", delta_size / 1e6, "MB", delta_size / base_size, "the base's weights")]
