"""The task that keeps this server's view of a shared store current."""

import asyncio
import logging
import time
from collections.abc import Callable

from server.artifacts.backing import StoreUnavailable
from server.artifacts.shelf import Followed, Shelf
from server.background import Background

_SWEEP_S = 3600.0

log = logging.getLogger("deltaworks.registry")


class Follower(Background):
    """Looks at the store every `interval_s`, so that no view is older than that and a look; `told` hears what changed."""

    what = "following the store"

    def __init__(self, shelf: Shelf, interval_s: float, told: Callable[[Followed], None]) -> None:
        self._shelf = shelf
        self._interval_s = interval_s
        self._told = told

    async def run(self) -> None:
        swept = time.monotonic()
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                self._told(await self._shelf.follow())
                if time.monotonic() - swept > _SWEEP_S:
                    await self._shelf.sweep()
                    swept = time.monotonic()
            except (StoreUnavailable, OSError) as error:
                log.warning("the store cannot be read, what it said last holds on: %s", error)
