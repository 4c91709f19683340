"""Residency: which deltas are in the engine's memory, and who is using them. Volatile; names are the registry's.

The pool is the only caller of `Engine.load` and `Engine.unload`. Loads are single-flight per digest; room is made by
dropping the least recently leased delta that nobody leases; where all are leased, a request waits, then gives up.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from server.core import GatewayError
from server.engine.base import Engine, EngineDelta
from server.telemetry import Telemetry


class DeltaCapacity(GatewayError):
    """Every resident delta is in use and none may be dropped."""


class DeltaInUse(GatewayError):
    """Running requests still use the delta."""


@dataclass(eq=False)
class Resident:
    """A delta that is resident (`nbytes` known) or on its way (`loading` not done)."""

    delta: EngineDelta
    loading: asyncio.Task[int]
    nbytes: int | None = None


class Pool:
    def __init__(self, engine: Engine, max_resident: int, wait_s: float, telemetry: Telemetry) -> None:
        self.max_resident = max_resident
        self._engine = engine
        self._wait_s = wait_s
        self._telemetry = telemetry
        self._residents: dict[str, Resident] = {}  # least recently leased first
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._leases: Counter[str] = Counter()  # includes requests that still wait for their delta
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def lease(self, delta: EngineDelta) -> AsyncIterator[None]:
        """The delta is resident and stays so inside the block. Raises DeltaCapacity, EngineLoadError.

        The lease counts from before the first await on: a delta that a request resolved cannot be deleted under it.
        """
        self._leases[delta.digest] += 1
        try:
            await self._make_resident(delta)
            yield
        finally:
            self._leases[delta.digest] -= 1
            if not self._leases[delta.digest]:
                del self._leases[delta.digest]
                self._notify()

    def leases(self, digest: str) -> int:
        return self._leases[digest]

    def state(self, digest: str) -> tuple[str, int | None]:
        """ "stored", "loading" or "resident", and the resident bytes."""
        resident = self._residents.get(digest)
        if resident is None:
            return "stored", None
        return ("loading", None) if resident.nbytes is None else ("resident", resident.nbytes)

    def residents(self) -> list[Resident]:
        return list(self._residents.values())

    async def load(self, delta: EngineDelta) -> None:
        """Warm a delta up. Raises as `lease`."""
        async with self.lease(delta):
            pass

    async def drop(self, digests: Sequence[str], wait_s: float) -> None:
        """Take deltas out of memory, after waiting for their leases to end. Raises DeltaInUse, nothing dropped then."""
        deadline = time.monotonic() + wait_s
        while any(self.leases(digest) for digest in digests):
            if not await self._change_before(deadline):
                raise DeltaInUse("running requests use the delta; try later, or with ?drain=true", param="name")
        leaving = [self._leave(self._residents[digest]) for digest in digests if digest in self._residents]
        leaving += [self._leaving[digest] for digest in digests if digest in self._leaving]
        await asyncio.gather(*leaving)

    async def close(self) -> None:
        """Cancel what is under way; the engine is about to stop."""
        loading = [resident.loading for resident in self._residents.values() if not resident.loading.done()]
        tasks = [*loading, *self._leaving.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _make_resident(self, delta: EngineDelta) -> None:
        deadline = time.monotonic() + self._wait_s
        while True:
            resident = self._residents.get(delta.digest)
            if resident is not None:
                self._residents[delta.digest] = self._residents.pop(delta.digest)
                await asyncio.shield(resident.loading)
                return
            if delta.digest not in self._leaving:
                if len(self._residents) + len(self._leaving) < self.max_resident:
                    self._residents[delta.digest] = self._start(delta)
                    continue
                self._evict()
            if not await self._change_before(deadline):
                raise DeltaCapacity("no room for the delta: all resident ones are in use", retry_after_s=2)

    def _start(self, delta: EngineDelta) -> Resident:
        resident = Resident(delta, asyncio.create_task(self._load(delta)))
        resident.loading.add_done_callback(lambda task: self._loaded(resident, task))
        return resident

    async def _load(self, delta: EngineDelta) -> int:
        started = time.perf_counter()
        nbytes = await self._engine.load(delta)
        self._telemetry.load_seconds.observe(time.perf_counter() - started)
        return nbytes

    def _loaded(self, resident: Resident, task: asyncio.Task[int]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._telemetry.loads.labels("error").inc()
            if self._residents.get(resident.delta.digest) is resident:
                del self._residents[resident.delta.digest]
        else:
            self._telemetry.loads.labels("ok").inc()
            resident.nbytes = task.result()
        self._notify()

    def _evict(self) -> None:
        """Start dropping the least recently leased idle delta, unless enough are leaving already."""
        if self._leaving:
            return
        for digest, resident in self._residents.items():
            if resident.nbytes is not None and not self.leases(digest):
                self._telemetry.evictions.inc()
                self._leave(resident)
                return

    def _leave(self, resident: Resident) -> asyncio.Task[None]:
        digest = resident.delta.digest
        del self._residents[digest]
        task = asyncio.create_task(self._unload(resident))
        self._leaving[digest] = task
        task.add_done_callback(lambda done: self._left(digest, done))
        return task

    async def _unload(self, resident: Resident) -> None:
        await asyncio.wait({resident.loading})  # a load that nobody waits for any more may still run
        if resident.nbytes is not None:
            await self._engine.unload(resident.delta)

    def _left(self, digest: str, task: asyncio.Task[None]) -> None:
        del self._leaving[digest]
        if not task.cancelled():
            task.exception()  # seen: whoever dropped the delta gets it too, and an evicting request goes on
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        done = [resident.nbytes for resident in self._residents.values() if resident.nbytes is not None]
        self._telemetry.resident.set(len(done))
        self._telemetry.resident_bytes.set(sum(done))

    async def _change_before(self, deadline: float) -> bool:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return False
        try:
            await asyncio.wait_for(self._changed.wait(), remaining)
        except TimeoutError:
            return False
        return True
