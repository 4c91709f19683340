"""The task that keeps this server's view of a shared store current."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from server.artifacts.backing import StoreUnavailable
from server.artifacts.shelf import Followed, Shelf

_SWEEP_S = 3600.0

log = logging.getLogger("deltaworks.registry")


class Follower:
    """Looks at the store every `interval_s`, so that no view is older than that and a look; `told` hears what changed."""

    def __init__(self, shelf: Shelf, interval_s: float, told: Callable[[Followed], None]) -> None:
        self._shelf = shelf
        self._interval_s = interval_s
        self._told = told
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A server that no longer follows would serve old names for ever."""
        if not task.cancelled() and (error := task.exception()):
            log.error("following the store failed, and starts again", exc_info=error)
            self.start()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
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
