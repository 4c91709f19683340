"""Work beside the requests, from the start of the server to its end."""

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from typing import ClassVar

log = logging.getLogger("deltaworks.background")


class Background(ABC):
    """A task that starts again where it fails: a server without it would serve old names for ever, and say nothing."""

    what: ClassVar[str]
    _task: asyncio.Task[None] | None = None

    @abstractmethod
    async def run(self) -> None:
        """Runs until it is cancelled."""

    def start(self) -> None:
        self._task = asyncio.create_task(self.run())
        self._task.add_done_callback(self._ended)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            log.error("%s failed, and starts again", self.what, exc_info=error)
            self.start()
