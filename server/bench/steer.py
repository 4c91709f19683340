"""`deltaworks bench steer`: what the edit plane costs, and what an edited prompt still reuses of the prefix cache."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

from compressors.base import resolve_base
from server.bench.contenders import Load, bare, ours
from server.bench.report import Measurement, reported
from server.bench.serve import BATCH, delta_files, engine_settings, interleaved, make_deltas
from server.core import Sampling
from server.engine.base import EngineEdit
from server.engine.vllm import VLLMEngine
from server.steering import Tables, planned_edit, profile_table

_PROMPT = 700  # tokens of the prompt whose prefix is shared: several blocks of the KV cache, and a part of one


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write JSON where asked."""
    return reported(args.json, lambda: asyncio.run(_measure(resolve_base(args.base), args)))


def profile_edit(profile: Path, direction: str, strength: float) -> EngineEdit:
    """The edit that a request with this profile becomes."""
    digest = hashlib.sha256(profile.read_bytes()).hexdigest()
    table = profile_table({"path": str(profile.resolve()), "digest": digest}, direction, strength)
    planned = planned_edit(Tables((table,), frozenset({digest}), features=0, first_layer=0))
    assert planned is not None
    return planned.edit


async def _measure(base: Path, args: argparse.Namespace) -> list[Measurement]:
    settings = engine_settings(args)
    edit = profile_edit(args.profile, args.direction, args.strength)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deltaworks-bench-")))
        deltas = make_deltas(delta_files(args.deltas), folder, BATCH)
        print("starting two engines ...", file=sys.stderr)
        plain = await stack.enter_async_context(bare(base, settings))
        plane = await stack.enter_async_context(ours(base, settings, deltas))
        await plane.engine.load_edit(edit)
        rows: list[None] = [None] * BATCH
        cases: dict[str, Callable[[], Awaitable[float]]] = {
            "bare vLLM, batch 8": lambda: plain.tokens_per_s(Load(tuple(rows), args.tokens)),
            "not steered, batch 8": lambda: plane.tokens_per_s(Load(tuple(rows), args.tokens)),
            "all steered, batch 8": lambda: plane.tokens_per_s(Load(tuple(rows), args.tokens, edit)),
            "8 deltas, not steered, batch 8": lambda: plane.tokens_per_s(Load(tuple(deltas), args.tokens)),
            "8 deltas, all steered, batch 8": lambda: plane.tokens_per_s(Load(tuple(deltas), args.tokens, edit)),
        }
        found = await interleaved(cases, args.repeats)
        reused = [await _reused(plane.engine, own, seed) for seed, own in enumerate((None, edit))]
    rivals = {
        "not steered, batch 8": "bare vLLM, batch 8",
        "all steered, batch 8": "not steered, batch 8",
        "8 deltas, all steered, batch 8": "8 deltas, not steered, batch 8",
    }
    measured = [
        Measurement(name, value, "tok/s", value / found[rivals[name]] if name in rivals else None, rivals.get(name))
        for name, value in found.items()
    ]
    by_plain, by_steered = "prompt reused by a plain request", "prompt reused by a steered request"
    measured.append(Measurement(by_plain, reused[0], "tokens"))
    measured.append(Measurement(by_steered, reused[1], "tokens", reused[1] / reused[0], by_plain))
    measured.append(Measurement("profile file", args.profile.stat().st_size / 1e6, "MB"))
    return measured


async def _reused(engine: VLLMEngine, edit: EngineEdit | None, seed: int) -> int:
    """Cached tokens of a request with this edit whose prompt a plain one has just run."""
    ids = [1000 + 7 * i + seed for i in range(_PROMPT)]
    cached = 0
    for name, own in (("first", None), ("second", edit)):
        sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
        async with aclosing(engine.generate(f"reuse-{seed}-{name}", ids, sampling, None, None, own)) as stream:
            async for event in stream:
                cached = event.cached_tokens
    return cached
