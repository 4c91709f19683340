"""R9 on the real engine: how soon a row that nobody reads any more has left the batch."""

import asyncio
import time
from contextlib import aclosing, suppress

import pytest

from server.core import Sampling
from tests.engine.bed import Runner

pytestmark = pytest.mark.engine

OTHERS, CANCELS = 8, 40


def test_r9_a_cancelled_row_is_gone_within_two_decode_steps(tiny_engine: Runner):
    """A call of the workers that is sent behind the abort is answered after it: that bounds what the abort took from above."""
    steps, took = tiny_engine.loop.run_until_complete(cancels(tiny_engine))
    step, p95 = sorted(steps)[len(steps) // 2], sorted(took)[len(took) * 95 // 100]
    print(
        f"decode step p50 {1000 * step:.1f} ms, cancel p50 {1000 * sorted(took)[len(took) // 2]:.1f} ms, p95 {1000 * p95:.1f} ms"
    )
    assert p95 < 2 * step


async def cancels(runner: Runner) -> tuple[list[float], list[float]]:
    """Seconds between tokens of a row beside which others are cancelled, and from each cancel to the answer behind it."""
    sampling = Sampling(max_tokens=480, temperature=0.0, ignore_eos=True)
    steps: list[float] = []
    took: list[float] = []

    async def row(number: int) -> None:
        last = None
        stream = runner.engine.generate(f"beside-{number}", range(300, 316), sampling, None, None)
        async with aclosing(stream):
            async for _ in stream:
                now = time.perf_counter()
                if number == 0 and last is not None:
                    steps.append(now - last)
                last = now

    beside = [asyncio.create_task(row(number)) for number in range(OTHERS)]
    for number in range(CANCELS):
        stream = runner.engine.generate(f"cancelled-{number}", range(300, 316), sampling, None, None)
        for _ in range(3):
            await anext(stream)
        started = time.perf_counter()
        await stream.aclose()
        await runner.engine._ask_workers("deltaworks_status")
        took.append(time.perf_counter() - started)
        assert not all(task.done() for task in beside)
    for task in beside:
        task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.gather(*beside)
    await asyncio.gather(*beside, return_exceptions=True)
    return steps, took
