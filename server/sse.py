"""Server-sent events: framing, and how a stream that has begun reports a failure."""

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from server.core import TokenEvent
from server.errors import describe
from server.replies import Reply
from server.telemetry import Exchange

DONE = b"data: [DONE]\n\n"

log = logging.getLogger("deltaworks.sse")


def frame(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def stream(
    reply: Reply, events: AsyncIterator[TokenEvent], include_usage: bool, exchange: Exchange
) -> AsyncGenerator[bytes, None]:
    """All frames of an answer. After the first byte a failure can only be one error event, [DONE], close."""
    try:
        async with aclosing(reply.chunks(events, include_usage)) as chunks:
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
