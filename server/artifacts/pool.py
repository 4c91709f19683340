"""Residency: what is in the engine's memory, and who is using it. Volatile; names are the registry's.

One pool holds the deltas, one the edits; they are the only callers of the engine's loads and unloads. Loads are
single-flight per key; room is made by dropping the least recently leased item that nobody leases; where all are
leased, a request waits, then gives up.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from server.artifacts.registry import DELTA, KindError
from server.core import GatewayError, InvalidRequest
from server.engine.base import Engine, EngineDelta, EngineEdit, EngineLoadError
from server.telemetry import ResidencyMetrics

Item = TypeVar("Item")


class NoCapacity(KindError):
    """Everything resident is in use and nothing may be dropped."""


class ArtifactInUse(KindError):
    """Running requests still use the artifact."""


class EditLoadFailed(GatewayError):
    """The engine could not load the edit; its artifacts may not fit the model."""


class Users(Protocol):
    """Who uses artifacts: the pool of deltas for those, the pool of edits for profiles and SAEs."""

    async def release(self, kind: str, digests: Sequence[str], wait_s: float) -> None:
        """Take what is made of the artifacts out of memory, after waiting for its leases. Raises ArtifactInUse."""
        ...

    def usage(self, digest: str) -> dict[str, Any]:
        """How the artifact is used now, as the admin plane shows it."""
        ...


@dataclass(eq=False)
class Resident(Generic[Item]):
    """An item that is resident (`nbytes` known) or on its way (`loading` not done)."""

    item: Item
    loading: asyncio.Task[int]
    nbytes: int | None = None


class Pool(ABC, Generic[Item]):
    """`kind` begins the codes of the pool's errors."""

    kind: str

    def __init__(self, engine: Engine, max_resident: int, wait_s: float, metrics: ResidencyMetrics) -> None:
        self.max_resident = max_resident
        self._engine = engine
        self._wait_s = wait_s
        self._metrics = metrics
        self._residents: dict[str, Resident[Item]] = {}  # least recently leased first
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._leases: Counter[str] = Counter()  # includes requests that still wait for their item
        self._changed = asyncio.Event()

    @abstractmethod
    def key(self, item: Item) -> str:
        """The item's only identity."""

    @abstractmethod
    async def engine_load(self, item: Item) -> int:
        """Returns resident bytes."""

    @abstractmethod
    async def engine_unload(self, item: Item) -> None: ...

    @contextmanager
    def hold(self, item: Item) -> Iterator[None]:
        """Count a lease, without a wait: what a request resolved cannot be deleted under it from here on."""
        key = self.key(item)
        self._leases[key] += 1
        try:
            yield
        finally:
            self._leases[key] -= 1
            if not self._leases[key]:
                del self._leases[key]
                self._notify()

    @asynccontextmanager
    async def lease(self, item: Item) -> AsyncIterator[None]:
        """The item is resident and stays so inside the block. Raises as `make_resident`."""
        with self.hold(item):
            await self.make_resident(item)
            yield

    def leases(self, key: str) -> int:
        return self._leases[key]

    def residents(self) -> list[Resident[Item]]:
        return list(self._residents.values())

    async def load(self, item: Item) -> None:
        """Warm an item up. Raises as `make_resident`."""
        async with self.lease(item):
            pass

    async def drop(self, keys: Collection[str], wait_s: float) -> None:
        """Take items out of memory, after waiting for their leases to end. Raises ArtifactInUse, nothing dropped then."""
        await self._until_free(lambda: any(self.leases(key) for key in keys), wait_s, self.kind)
        leaving = [self._leave(self._residents[key]) for key in keys if key in self._residents]
        leaving += [self._leaving[key] for key in keys if key in self._leaving]
        await asyncio.gather(*leaving)

    async def close(self) -> None:
        """Cancel what is under way; the engine is about to stop."""
        loading = [resident.loading for resident in self._residents.values() if not resident.loading.done()]
        tasks = [*loading, *self._leaving.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def make_resident(self, item: Item) -> None:
        """Call it while holding the item. Raises NoCapacity, and what loading raises."""
        key = self.key(item)
        deadline = time.monotonic() + self._wait_s
        while True:
            resident = self._residents.get(key)
            if resident is not None:
                self._residents[key] = self._residents.pop(key)
                await asyncio.shield(resident.loading)
                return
            if key not in self._leaving:
                if len(self._residents) + len(self._leaving) < self.max_resident:
                    self._residents[key] = self._start(item)
                    continue
                self._evict()
            if not await self._change_before(deadline):
                message = f"no room for the {self.kind}: all resident ones are in use"
                raise NoCapacity(self.kind, message, retry_after_s=2)

    async def _until_free(self, used: Callable[[], bool], wait_s: float, kind: str) -> None:
        deadline = time.monotonic() + wait_s
        while used():
            if not await self._change_before(deadline):
                message = f"running requests use the {kind}; try later, or with ?drain=true"
                raise ArtifactInUse(kind, message, param="name")

    def _start(self, item: Item) -> Resident[Item]:
        resident = Resident(item, asyncio.create_task(self._load(item)))
        resident.loading.add_done_callback(lambda task: self._loaded(resident, task))
        return resident

    async def _load(self, item: Item) -> int:
        started = time.perf_counter()
        nbytes = await self.engine_load(item)
        self._metrics.load_seconds.observe(time.perf_counter() - started)
        return nbytes

    def _loaded(self, resident: Resident[Item], task: asyncio.Task[int]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._metrics.loads.labels("error").inc()
            key = self.key(resident.item)
            if self._residents.get(key) is resident:
                del self._residents[key]
        else:
            self._metrics.loads.labels("ok").inc()
            resident.nbytes = task.result()
        self._notify()

    def _evict(self) -> None:
        """Start dropping the least recently leased idle item, unless enough are leaving already."""
        if self._leaving:
            return
        for key, resident in self._residents.items():
            if resident.nbytes is not None and not self.leases(key):
                self._metrics.evictions.inc()
                self._leave(resident)
                return

    def _leave(self, resident: Resident[Item]) -> asyncio.Task[None]:
        key = self.key(resident.item)
        del self._residents[key]
        task = asyncio.create_task(self._unload(resident))
        self._leaving[key] = task
        task.add_done_callback(lambda done: self._left(key, done))
        return task

    async def _unload(self, resident: Resident[Item]) -> None:
        await asyncio.wait({resident.loading})  # a load that nobody waits for any more may still run
        if resident.nbytes is not None:
            await self.engine_unload(resident.item)

    def _left(self, key: str, task: asyncio.Task[None]) -> None:
        del self._leaving[key]
        if not task.cancelled():
            task.exception()  # seen: whoever dropped the item gets it too, and an evicting request goes on
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        done = [resident.nbytes for resident in self._residents.values() if resident.nbytes is not None]
        self._metrics.resident.set(len(done))
        if self._metrics.resident_bytes is not None:
            self._metrics.resident_bytes.set(sum(done))

    async def _change_before(self, deadline: float) -> bool:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return False
        try:
            await asyncio.wait_for(self._changed.wait(), remaining)
        except TimeoutError:
            return False
        return True


class CombinationPool(Pool[EngineDelta]):
    """Keys are the digests of combinations, which a `DeltaPool` holds together with their parts; none outlives a part."""

    kind = "combination"

    def key(self, item: EngineDelta) -> str:
        return item.digest

    async def engine_load(self, item: EngineDelta) -> int:
        return await self._engine.load(item)

    async def engine_unload(self, item: EngineDelta) -> None:
        await self._engine.unload(item)

    def forget(self, part: str) -> None:
        """A part leaves, so nobody leases what is made of it: that leaves too."""
        for resident in self.residents():
            if any(part == one.delta.digest for one in resident.item.parts):
                self._leave(resident)


class DeltaPool(Pool[EngineDelta]):
    """Keys are the deltas' digests. A lease of a combination is one of each of its parts too."""

    kind = DELTA

    def __init__(
        self,
        engine: Engine,
        max_resident: int,
        wait_s: float,
        metrics: ResidencyMetrics,
        combinations: CombinationPool,
    ) -> None:
        super().__init__(engine, max_resident, wait_s, metrics)
        self.combinations = combinations

    @contextmanager
    def hold(self, item: EngineDelta) -> Iterator[None]:
        if not item.parts:
            with super().hold(item):
                yield
            return
        with ExitStack() as held:
            for part in item.parts:
                held.enter_context(super().hold(part.delta))
            held.enter_context(self.combinations.hold(item))
            yield

    async def make_resident(self, item: EngineDelta) -> None:
        """Raises InvalidRequest too, for more parts than there is ever room for."""
        if not item.parts:
            await super().make_resident(item)
            return
        if len(item.parts) > self.max_resident:
            message = f"this server keeps at most {self.max_resident} deltas in memory, so it cannot combine more"
            raise InvalidRequest(message, param="delta")
        for part in item.parts:
            await super().make_resident(part.delta)
        await self.combinations.make_resident(item)

    async def close(self) -> None:
        await self.combinations.close()
        await super().close()

    def _leave(self, resident: Resident[EngineDelta]) -> asyncio.Task[None]:
        self.combinations.forget(self.key(resident.item))
        return super()._leave(resident)

    def key(self, item: EngineDelta) -> str:
        return item.digest

    async def engine_load(self, item: EngineDelta) -> int:
        return await self._engine.load(item)

    async def engine_unload(self, item: EngineDelta) -> None:
        await self._engine.unload(item)

    async def release(self, kind: str, digests: Sequence[str], wait_s: float) -> None:
        await self.drop(digests, wait_s)

    def state(self, digest: str) -> tuple[str, int | None]:
        """ "stored", "loading" or "resident", and the resident bytes."""
        resident = self._residents.get(digest)
        if resident is None:
            return "stored", None
        return ("loading", None) if resident.nbytes is None else ("resident", resident.nbytes)

    def usage(self, digest: str) -> dict[str, Any]:
        state, resident_bytes = self.state(digest)
        return {"state": state, "resident_bytes": resident_bytes, "in_flight": self.leases(digest)}


@dataclass(frozen=True)
class PlannedEdit:
    """An edit, and the digests of the artifacts that it is made of."""

    edit: EngineEdit
    artifacts: frozenset[str]


class EditPool(Pool[PlannedEdit]):
    """Keys are the edits' fingerprints; an edit in use keeps the profiles and SAEs that it is made of."""

    kind = "edit"

    def __init__(self, engine: Engine, max_resident: int, wait_s: float, metrics: ResidencyMetrics) -> None:
        super().__init__(engine, max_resident, wait_s, metrics)
        self._in_use: Counter[str] = Counter()  # requests per artifact

    def key(self, item: PlannedEdit) -> str:
        return item.edit.fingerprint

    async def engine_load(self, item: PlannedEdit) -> int:
        try:
            await self._engine.load_edit(item.edit)
        except EngineLoadError as error:
            raise EditLoadFailed("the engine could not load the edit") from error
        return 0

    async def engine_unload(self, item: PlannedEdit) -> None:
        await self._engine.unload_edit(item.edit)

    @contextmanager
    def hold(self, item: PlannedEdit) -> Iterator[None]:
        with super().hold(item):
            self._in_use.update(item.artifacts)
            try:
                yield
            finally:
                self._in_use.subtract(item.artifacts)
                self._in_use += Counter()  # forgets the zeros

    async def release(self, kind: str, digests: Sequence[str], wait_s: float) -> None:
        await self._until_free(lambda: any(self._in_use[digest] for digest in digests), wait_s, kind)
        await self.drop(self._made_of(digests), 0)
        if self._leaving:  # evicted a moment ago: its load may still read the file
            await asyncio.wait(self._leaving.values())

    def usage(self, digest: str) -> dict[str, Any]:
        return {"resident_edits": len(self._made_of([digest])), "in_flight": self._in_use[digest]}

    def _made_of(self, digests: Collection[str]) -> list[str]:
        return [key for key, resident in self._residents.items() if not resident.item.artifacts.isdisjoint(digests)]
