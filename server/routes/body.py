"""Reading from a client that may send too much, or go away."""

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from starlette.requests import ClientDisconnect, Request

from server.artifacts.store import BodyTooLarge
from server.core import GatewayError, InvalidRequest
from server.wire import Body, parse

if TYPE_CHECKING:
    from server.routes.context import Context

Result = TypeVar("Result")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ClientGone(GatewayError):
    """The client closed the connection; nobody reads the answer. `at`: when that was seen, of `time.perf_counter`."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.at = time.perf_counter()


class BodyTimeout(GatewayError):
    """The client sends too slowly."""


def body_timeout_s(request: Request) -> float:
    """What the settings say."""
    seconds: float = request.app.state.context.limits.body_timeout_s
    return seconds


def check_length(request: Request, max_bytes: int) -> None:
    """Refuse by the announced length, before reading. Raises BodyTooLarge, InvalidRequest."""
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal():
        raise InvalidRequest("content-length is not a number")
    if int(announced) > max_bytes:
        raise BodyTooLarge(f"the body is larger than the limit of {max_bytes} bytes")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises BodyTooLarge, BodyTimeout, ClientGone."""
    check_length(request, max_bytes)
    body, limit_s = bytearray(), body_timeout_s(request)
    try:
        async with asyncio.timeout(limit_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise BodyTooLarge(f"the body is larger than the limit of {max_bytes} bytes")
    except TimeoutError as error:
        raise BodyTimeout(f"the body was not complete after {limit_s:g} s") from error
    except ClientDisconnect as error:
        raise ClientGone("the client went away while sending") from error
    return bytes(body)


@dataclass(frozen=True)
class JsonBody(Generic[Body]):
    """The body of a request as that wire model: a dependency of the handlers, and what the API's document says of them."""

    model: type[Body]

    async def __call__(self, request: Request) -> Body:
        """Raises what `read_body` and `parse` raise."""
        context: Context = request.app.state.context
        return parse(self.model, await read_body(request, context.limits.max_body_bytes), context.unread)


async def until_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """Await `work`, but cancel it as soon as the client disconnects. Call it after the body is read.

    Raises ClientGone, and whatever `work` raises.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone("the client went away")
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
