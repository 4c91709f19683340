"""Several streams as one: nothing lost, nothing left open."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from server.core import FinishReason, TokenEvent
from server.interleave import interleave

pytestmark = pytest.mark.anyio


class Streams:
    """Makes streams that note when they are closed; `fail_at` raises at that step of stream 1."""

    def __init__(self) -> None:
        self.open: set[int] = set()

    async def make(self, number: int, steps: int, fail_at: int = -1) -> AsyncGenerator[TokenEvent, None]:
        self.open.add(number)
        try:
            for step in range(steps):
                await asyncio.sleep(0.001 * (number + 1))
                if step == fail_at:
                    raise RuntimeError("broken")
                yield TokenEvent(step % 2, f"{number}.{step}", (step,), None, FinishReason.STOP, 1, 0)
        finally:
            self.open.discard(number)


async def test_every_event_once_in_order_and_numbered_by_prompt() -> None:
    streams = Streams()
    events = [event async for event in interleave([streams.make(n, 4) for n in range(3)], n=2)]
    for number in range(3):
        mine = [event for event in events if event.text.startswith(f"{number}.")]
        assert [event.text for event in mine] == [f"{number}.{step}" for step in range(4)]
        assert [event.index for event in mine] == [2 * number, 2 * number + 1] * 2
    assert len(events) == 12
    assert not streams.open


async def test_first_error_closes_all() -> None:
    streams = Streams()
    with pytest.raises(RuntimeError, match="broken"):
        async for _ in interleave([streams.make(0, 9), streams.make(1, 9, fail_at=2), streams.make(2, 9)], n=2):
            pass
    assert not streams.open


async def test_leaving_closes_all_also_where_an_event_is_waiting() -> None:
    streams = Streams()
    merged = interleave([streams.make(n, 9) for n in range(3)], n=2)
    await anext(merged)
    await asyncio.sleep(0.02)  # every stream has its next event ready now
    assert streams.open == {0, 1, 2}
    await merged.aclose()
    assert not streams.open
