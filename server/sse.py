"""Server-sent events: framing, signs of life, and how a stream that has begun reports a failure."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from server.core import TokenEvent
from server.errors import describe
from server.replies import Reply, StreamedUsage
from server.telemetry import Exchange

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"  # a comment: clients skip it

log = logging.getLogger("deltaworks.sse")


class Line:
    """Where the frames of a stream go. After `keep_alive_s` of silence it says KEEP_ALIVE; 0 = never."""

    def __init__(self, write: Callable[[bytes], Awaitable[None]], keep_alive_s: float) -> None:
        self._write = write
        self._keep_alive_s = keep_alive_s
        self._writing = asyncio.Lock()
        self._spoke = time.monotonic()

    async def say(self, frame: bytes) -> None:
        async with self._writing:
            await self._write(frame)
        self._spoke = time.monotonic()

    @asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[None]:
        ticking = asyncio.create_task(self._tick()) if self._keep_alive_s else None
        try:
            yield
        finally:
            if ticking is not None:
                ticking.cancel()
                await asyncio.gather(ticking, return_exceptions=True)

    async def _tick(self) -> None:
        while True:
            left_s = self._keep_alive_s - (time.monotonic() - self._spoke)
            if left_s <= 0:
                await self.say(KEEP_ALIVE)
            else:
                await asyncio.sleep(left_s)


def frame(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def stream(
    reply: Reply, events: AsyncIterator[TokenEvent], usage: StreamedUsage, exchange: Exchange
) -> AsyncGenerator[bytes, None]:
    """All frames of an answer. After the first byte a failure can only be one error event, [DONE], close."""
    try:
        async with aclosing(reply.chunks(events, usage)) as chunks:
            async for chunk in chunks:
                yield frame(chunk)
    except Exception as error:
        problem = describe(error)
        if problem.status >= 500:
            log.exception("a stream failed", extra={"fields": {"request_id": exchange.request_id}})
        exchange.error_code = problem.code
        exchange.failed_status = problem.status
        yield frame(problem.body)
    yield DONE
