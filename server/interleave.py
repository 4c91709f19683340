"""Several engine streams as one, in the order in which their events come."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from server.core import TokenEvent


async def interleave(streams: Sequence[AsyncGenerator[TokenEvent, None]], n: int) -> AsyncGenerator[TokenEvent, None]:
    """Stream p's choice i comes out as index p * n + i. The first error ends all; leaving closes every stream."""
    waiting = {asyncio.ensure_future(anext(stream)): position for position, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda task: waiting[task]):
                position = waiting.pop(task)
                try:
                    event = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(streams[position]))] = position
                yield replace(event, index=position * n + event.index)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
