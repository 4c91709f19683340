"""The engine's life: start, death, and start again after a growing wait; and with it whether requests are taken.

An engine that is alive and does nothing is as bad as a dead one, and is made one: where it owes answers and has given no sign of
life for `stall_s`, it is killed.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge

from server.config import RestartSettings
from server.core import GatewayError
from server.engine.base import Engine, EngineDeadError, EngineError

_POLL_S = 0.05  # how soon a death is acted upon; readiness asks the engine itself
_MAX_BACKOFF_S = 60.0
_KILL_S = 10.0  # how soon an engine that is killed is seen to be dead, at the latest
_LOOKS = 4  # without a sign of life that a stall takes at least: a process that was suspended has not looked

log = logging.getLogger("deltaworks.engine")


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    ENGINE_DEAD = "engine_dead"


class NotReady(GatewayError):
    """The base is still loading."""


class Draining(GatewayError):
    """The server is stopping, or was told to take no new requests."""


class LifeMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.up = Gauge("deltaworks_engine_up", "Whether the engine answers.", registry=registry)
        self.restarts = Counter(
            "deltaworks_engine_restarts", "Starts of the engine after its death.", ["outcome"], registry=registry
        )
        for outcome in ("ok", "error"):
            self.restarts.labels(outcome)
        self.stalls = Counter(
            "deltaworks_engine_stalls", "Engines that were killed because they made no step.", registry=registry
        )


class Supervisor:
    """Starts one engine, and starts it again. `lost` is awaited when it has died, `back` is called when it is up."""

    def __init__(
        self,
        engine: Engine,
        settings: RestartSettings,
        metrics: LifeMetrics,
        lost: Callable[[], Awaitable[None]],
        back: Callable[[bool], None],
    ) -> None:
        """`back` is told whether the engine had died but once; loading what was in it may be what kills it."""
        self._engine = engine
        self._settings = settings
        self._lost = lost
        self._back = back
        self._restarts = metrics.restarts
        self._stalls = metrics.stalls
        self._started = False
        self._down = False  # from the moment that a death is acted upon to the end of the restart
        self._stalled = False  # from then on to the end of the restart
        self._stopping = False
        self._drained_by_hand = False
        self._start_s = 0.0  # how long the last start took
        self._next_start = 0.0
        self._watching: asyncio.Task[None] | None = None
        self.given_up = False
        metrics.up.set_function(lambda: self._started and not self._dead)

    @property
    def state(self) -> State:
        if self._stopping or (self._drained_by_hand and self._started):
            return State.DRAINING
        if not self._started:
            return State.LOADING
        return State.ENGINE_DEAD if self._dead else State.READY

    @property
    def started(self) -> bool:
        """Whether the engine was up once."""
        return self._started

    @property
    def _dead(self) -> bool:
        return self._down or self._stalled or self._engine.dead

    async def start(self) -> None:
        """Raises EngineError."""
        await self._start_engine()
        self._started = True
        self._watching = asyncio.create_task(self._watch())
        self._watching.add_done_callback(self._ended)
        self._back(True)

    async def close(self) -> None:
        """No request, no restart from here on; the engine is as it is."""
        self._stopping = True
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    def drain(self, stopping: bool = True) -> None:
        """Take no new requests; for good where the server is `stopping`, else until `resume`."""
        self._stopping = self._stopping or stopping
        self._drained_by_hand = True

    def resume(self) -> None:
        """Raises Draining where the server is stopping."""
        if self._stopping:
            raise Draining("the server is stopping", retry_after_s=5)
        self._drained_by_hand = False

    def require_ready(self) -> None:
        """Raises NotReady, Draining, EngineDeadError."""
        match self.state:
            case State.LOADING:
                raise NotReady("the model is still loading", retry_after_s=5)
            case State.DRAINING:
                raise Draining("the server takes no new requests", retry_after_s=5)
            case State.ENGINE_DEAD:
                raise self.dead_error()

    def dead_error(self) -> EngineDeadError:
        """What a request is told that meets a dead engine; with the time to the end of the restart, if there is one."""
        if self.given_up or not self._settings.max_restarts:
            return EngineDeadError("the engine has stopped")
        now = time.monotonic()
        ready_at = (self._next_start if self._down else now + self._settings.backoff_s) + self._start_s
        message = "the engine has stopped and is restarted"
        return EngineDeadError(message, retry_after_s=max(1, math.ceil(ready_at - now)))

    async def _watch(self) -> None:
        """Restart the engine whenever it dies, until it has died too often in a row."""
        deaths, up_since = 0, time.monotonic()
        while True:
            await self._death()
            deaths = 1 if time.monotonic() - up_since > self._settings.reset_s else deaths + 1
            self._next_start = time.monotonic() + self._wait_s(deaths)
            self._down = True
            log.error("the engine has died", extra={"fields": {"deaths": deaths}})
            with contextlib.suppress(EngineError):
                await self._lost()
            while not await self._restart(deaths):
                deaths += 1
                if self.given_up:
                    return
            up_since = time.monotonic()
            self._down = self._stalled = False
            self._back(deaths == 1)

    async def _death(self) -> None:
        """Return when the engine is dead; one that stalls is killed."""
        limit_s = self._settings.stall_s
        silent_s, signs, looked = 0.0, self._engine.signs, time.monotonic()
        while not self._engine.dead:
            await asyncio.sleep(_POLL_S)
            before, looked = looked, time.monotonic()
            if self._stalled:
                silent_s += looked - before
                if silent_s > _KILL_S:
                    return
            elif not limit_s or not self._engine.busy or self._engine.signs != signs:
                silent_s, signs = 0.0, self._engine.signs
            else:
                silent_s += min(looked - before, limit_s / _LOOKS)
                if silent_s >= limit_s:
                    self._stalled, silent_s = True, 0.0
                    self._stalls.inc()
                    log.error("the engine has stalled and is killed", extra={"fields": {"stall_s": limit_s}})
                    self._engine.kill()

    def _ended(self, watching: asyncio.Task[None]) -> None:
        if not watching.cancelled() and (error := watching.exception()) is not None:
            self.given_up = True
            log.error("the engine is no longer watched", exc_info=error)

    async def _restart(self, deaths: int) -> bool:
        """Whether the engine is up again."""
        await self._engine.stop()
        if deaths > self._settings.max_restarts:
            self.given_up = True
            log.error("the engine is given up", extra={"fields": {"deaths": deaths}})
            return False
        self._next_start = time.monotonic() + self._wait_s(deaths)
        await asyncio.sleep(self._wait_s(deaths))
        try:
            await self._start_engine()
        except EngineError:
            self._restarts.labels("error").inc()
            log.exception("the engine did not start again")
            return False
        self._restarts.labels("ok").inc()
        log.warning("the engine is up again", extra={"fields": {"start_s": round(self._start_s, 3)}})
        return True

    def _wait_s(self, deaths: int) -> float:
        return min(self._settings.backoff_s * 2.0 ** (deaths - 1), _MAX_BACKOFF_S)

    async def _start_engine(self) -> None:
        started = time.monotonic()
        starting = asyncio.ensure_future(self._engine.start())
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:  # it runs on in a thread, and a half-built engine cannot be stopped
            await asyncio.gather(starting, return_exceptions=True)
            raise
        self._start_s = time.monotonic() - started
