"""How long a request may take, from its arrival to the end of its answer."""

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing

from server.core import GatewayError, InvalidRequest, TokenEvent

HEADER = "x-request-timeout-ms"
MILLISECONDS = r"^[1-9][0-9]{0,8}$"
_MILLISECONDS = re.compile(MILLISECONDS)


class DeadlineExceeded(GatewayError):
    """The request took longer than it may."""


def limit_s(asked: str | None, most: float | None) -> float | None:
    """What a request asks for (the header's text), at most what the settings allow. Raises InvalidRequest."""
    if asked is None:
        return most
    if not _MILLISECONDS.fullmatch(asked):
        raise InvalidRequest(f"{HEADER} is not a number of milliseconds", param=HEADER)
    return min(int(asked) / 1000, most or float("inf"))


async def within(
    events: AsyncGenerator[TokenEvent, None], seconds: float, spent: float
) -> AsyncGenerator[TokenEvent, None]:
    """The same events, ended by DeadlineExceeded `seconds` after the request's arrival, of which `spent` are over."""
    ends = asyncio.get_running_loop().time() + seconds - spent
    async with aclosing(events):
        while True:
            try:
                async with asyncio.timeout_at(ends) as timer:
                    event = await anext(events)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                if not timer.expired():
                    raise
                raise DeadlineExceeded(f"the answer was not complete after {seconds:g} s") from error
            yield event
