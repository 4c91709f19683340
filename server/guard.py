"""What a connection may do before it has sent the head of a request: so many bytes, in so much time.

uvicorn limits neither where httptools parses; a client that sends its head byte by byte, or without an end, would hold a
connection and its memory for as long as it likes.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

_PHRASES = {408: "Request Timeout", 431: "Request Header Fields Too Large"}


class HeadGuard(asyncio.Protocol):
    """Around uvicorn's protocol of one connection, which knows when a request has begun (its `cycle`)."""

    def __init__(self, inner: Any, max_bytes: int, timeout_s: float) -> None:
        self._inner = inner
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._transport: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._nbytes = 0  # of the head, so far
        self._last = b""  # of those, where the head's end may have begun

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._inner.connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        inner = self._inner
        cycle = inner.cycle
        if cycle is not None and not cycle.response_complete:
            inner.data_received(data)
            return
        if not self._leftover and self._grows_too_large(data):
            self._refuse(431, "headers_too_large", f"the head of a request may have {self._max_bytes} bytes")
            return
        self._start_timer()
        inner.data_received(data)
        if inner.cycle is not cycle:
            self._nbytes, self._last = 0, b""
            self._stop_timer()

    def _grows_too_large(self, data: bytes) -> bool:
        """Whether the head, with this part of it, has no end within the limit; a body may follow the end."""
        ends_within = self._last + data[: self._max_bytes - self._nbytes]
        self._nbytes += len(data)
        self._last = (self._last + data[-3:])[-3:]
        return self._nbytes > self._max_bytes and b"\r\n\r\n" not in ends_within

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._inner.connection_lost(exc)

    def eof_received(self) -> None:
        self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    @property
    def _leftover(self) -> bool:
        """What comes may be the body of a request that is answered already."""
        cycle = self._inner.cycle
        return cycle is not None and bool(cycle.more_body)

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._too_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        self._refuse(408, "head_timeout", f"the head of the request was not complete after {self._timeout_s:g} s")

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer in the shape of all errors, though no request has begun that the application could answer."""
        self._stop_timer()
        kind = "timeout_error" if status == 408 else "invalid_request_error"
        error = {"message": message, "type": kind, "param": None, "code": code}
        body = json.dumps({"error": error}).encode()
        head = (
            f"HTTP/1.1 {status} {_PHRASES[status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        if not self._transport.is_closing():
            if not self._leftover:
                self._transport.write(head.encode() + body)
            self._transport.close()


def guarded(protocol: Callable[..., Any], max_bytes: int, timeout_s: float) -> Callable[..., HeadGuard]:
    """What uvicorn makes a connection's protocol with."""

    def make(**options: Any) -> HeadGuard:
        return HeadGuard(protocol(**options), max_bytes, timeout_s)

    return make
