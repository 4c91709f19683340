"""Residency: what is in the engine's memory, and who is using it. Volatile; names are the registry's.

One pool holds the deltas (delta_pool.py), one the edits; they are the only callers of the engine's loads and unloads. Loads
are single-flight per key. Room is a number of items and, where there is a budget, their bytes; it is made by dropping the
least recently leased items that nobody leases and nobody pinned. Where that gives too little, requests wait in the order in
which they came, then give up: one that waits is not overtaken, so that a large item gets its room too.
"""

import asyncio
import math
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from server.artifacts.names import KindError
from server.core import GatewayError
from server.engine.base import Engine, EngineEdit, EngineLoadError
from server.metrics.residency import Reason, ResidencyMetrics

Item = TypeVar("Item")
THRASH_S = 60.0  # a load so soon after an eviction is one that more room would have saved


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
    """An item that is resident (`nbytes` known) or on its way (`loading` not done). `reserved`: what the budget counts."""

    item: Item
    loading: asyncio.Task[int]
    reserved: int
    nbytes: int | None = None


@dataclass(eq=False)
class Leaving:
    """An item that the engine is dropping; it counts until it is gone."""

    reserved: int
    task: asyncio.Task[None]


class Pool(ABC, Generic[Item]):
    """`kind` begins the codes of the pool's errors. `max_bytes` None: only the number of items is limited."""

    kind: str

    def __init__(
        self,
        engine: Engine,
        max_resident: int,
        wait_s: float,
        metrics: ResidencyMetrics,
        max_bytes: int | None = None,
    ) -> None:
        self.max_resident = max_resident
        self.max_bytes = max_bytes
        self._engine = engine
        self._wait_s = wait_s
        self._metrics = metrics
        self._residents: dict[str, Resident[Item]] = {}  # least recently leased first
        self._leaving: dict[str, Leaving] = {}
        self._evicted: dict[str, float] = {}  # when, by key; oldest first
        self._waiting: deque[object] = deque()  # a ticket per request without room; the first one takes the next room
        self._leases: Counter[str] = Counter()  # includes requests that still wait for their item
        self._parked: Counter[str] = Counter()  # of those leases, the ones that take no room yet
        self._changed = asyncio.Event()

    @abstractmethod
    def key(self, item: Item) -> str:
        """The item's only identity."""

    @abstractmethod
    async def engine_load(self, item: Item) -> int:
        """Returns resident bytes."""

    @abstractmethod
    async def engine_unload(self, item: Item) -> None: ...

    async def measure(self, item: Item) -> int:
        """Bytes to set aside for an item; asked before there is room for it."""
        return 0

    def refuse(self, item: Item) -> None:
        """Raises where a load is not worth a try."""

    def pinned(self, key: str) -> bool:
        """Whether an item stays also when nobody leases it."""
        return False

    def source(self, item: Item) -> str:
        """Where the bytes of a load that has just ended came from, as the metrics call it; "" where they do not say."""
        return ""

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

    @contextmanager
    def parked(self, item: Item) -> Iterator[None]:
        """Inside, a held item cannot be deleted but may be evicted: a request that waits for its turn needs no room."""
        key = self.key(item)
        self._parked[key] += 1
        self._notify()
        try:
            yield
        finally:
            self._parked[key] -= 1
            if not self._parked[key]:
                del self._parked[key]

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

    async def drop(self, keys: Collection[str], wait_s: float, reason: Reason = "unload") -> None:
        """Take items out of memory, after waiting for their leases to end. Raises ArtifactInUse, nothing dropped then."""
        await self._until_free(lambda: any(self.leases(key) for key in keys), wait_s, self.kind)
        leaving = []
        for key in keys:
            if key in self._residents:
                self._metrics.count_eviction(reason)
                leaving.append(self._leave(self._residents[key]))
        leaving += [self._leaving[key].task for key in keys if key in self._leaving]
        await asyncio.gather(*leaving)

    async def close(self) -> None:
        """Cancel what is under way; the engine is about to stop."""
        loading = [resident.loading for resident in self._residents.values() if not resident.loading.done()]
        tasks = [*loading, *(leaving.task for leaving in self._leaving.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def reset(self) -> list[Item]:
        """The engine has died and nothing is resident any more; returns what was, most recently leased first.

        What is under way fails by itself, and so do the requests that wait for it.
        """
        tasks: list[asyncio.Task[Any]] = [resident.loading for resident in self._residents.values()]
        tasks += [leaving.task for leaving in self._leaving.values()]
        if tasks:
            await asyncio.wait(tasks)
        lost = [resident.item for resident in reversed(self._residents.values()) if resident.nbytes is not None]
        self._residents.clear()
        self._notify()
        return lost

    async def make_resident(self, item: Item) -> None:
        """Call it while holding the item. Raises NoCapacity, and what measuring and loading raise."""
        key, started = self.key(item), False
        if key not in self._residents:
            self.refuse(item)
            started = await self._place(item, await self.measure(item))
        resident = self._residents[key] = self._residents.pop(key)
        if not started and not resident.loading.done():
            self._metrics.coalesced.inc()
        await asyncio.shield(resident.loading)

    async def _place(self, item: Item, nbytes: int) -> bool:
        """Start the load as soon as there is room, unless somebody else does: False. Raises NoCapacity, and as `refuse`."""
        key, deadline = self.key(item), time.monotonic() + self._wait_s
        ticket = object()
        self._waiting.append(ticket)
        try:
            while key not in self._residents:
                self.refuse(item)
                if self._waiting[0] is ticket and key not in self._leaving:
                    if self._fits(nbytes):
                        self._residents[key] = self._start(item, nbytes)
                        return True
                    self._make_room(nbytes)
                if not await self._change_before(deadline):
                    message = f"no room for the {self.kind}: all resident ones are in use"
                    raise NoCapacity(self.kind, message, retry_after_s=2)
            return False
        finally:
            self._waiting.remove(ticket)
            self._notify()

    async def _until_free(self, used: Callable[[], bool], wait_s: float, kind: str) -> None:
        deadline = time.monotonic() + wait_s
        while used():
            if not await self._change_before(deadline):
                message = f"running requests use the {kind}; try later, or with ?drain=true"
                raise ArtifactInUse(kind, message, param="name")

    def _start(self, item: Item, nbytes: int) -> Resident[Item]:
        if time.monotonic() - self._evicted.pop(self.key(item), -math.inf) < THRASH_S:
            self._metrics.thrash.inc()
        resident = Resident(item, asyncio.create_task(self._load(item)), nbytes)
        resident.loading.add_done_callback(lambda task: self._loaded(resident, task))
        return resident

    async def _load(self, item: Item) -> int:
        started = time.perf_counter()
        nbytes = await self.engine_load(item)
        self._metrics.time_load(self.source(item), time.perf_counter() - started)
        return nbytes

    def _loaded(self, resident: Resident[Item], task: asyncio.Task[int]) -> None:
        if task.cancelled() or task.exception() is not None:
            outcome = "cancelled" if task.cancelled() else "error"
            self._metrics.count_load(self.source(resident.item), outcome)
            key = self.key(resident.item)
            if self._residents.get(key) is resident:
                del self._residents[key]
        else:
            self._metrics.count_load(self.source(resident.item), "ok")
            resident.nbytes = resident.reserved = task.result()
        self._notify()

    def _fits(self, nbytes: int) -> bool:
        held = [resident.reserved for resident in self._residents.values()]
        held += [leaving.reserved for leaving in self._leaving.values()]
        return len(held) < self.max_resident and (self.max_bytes is None or sum(held) + nbytes <= self.max_bytes)

    def _make_room(self, nbytes: int) -> None:
        """Start dropping idle items, least recently leased first, where that and what leaves already is enough."""
        count, used = len(self._residents), sum(resident.reserved for resident in self._residents.values())
        victims: list[tuple[Resident[Item], Reason]] = []
        for key, resident in self._residents.items():
            if count < self.max_resident and (self.max_bytes is None or used + nbytes <= self.max_bytes):
                break
            if resident.nbytes is not None and self.leases(key) == self._parked[key] and not self.pinned(key):
                victims.append((resident, "lru" if count >= self.max_resident else "budget"))
                count, used = count - 1, used - resident.reserved
        if count < self.max_resident and (self.max_bytes is None or used + nbytes <= self.max_bytes):
            for resident, reason in victims:
                self._metrics.count_eviction(reason)
                self._note_evicted(self.key(resident.item))
                self._leave(resident)

    def _note_evicted(self, key: str) -> None:
        now = time.monotonic()
        self._evicted.pop(key, None)
        self._evicted[key] = now
        while now - self._evicted[oldest := next(iter(self._evicted))] >= THRASH_S:
            del self._evicted[oldest]

    def _leave(self, resident: Resident[Item]) -> asyncio.Task[None]:
        key = self.key(resident.item)
        del self._residents[key]
        task = asyncio.create_task(self._unload(resident))
        self._leaving[key] = Leaving(resident.reserved, task)
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
        self._metrics.show_resident(len(done), sum(done))

    async def _change_before(self, deadline: float) -> bool:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return False
        try:
            await asyncio.wait_for(self._changed.wait(), remaining)
        except TimeoutError:
            return False
        return True


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
        await self.drop(self._made_of(digests), 0, "delete")
        if self._leaving:  # evicted a moment ago: its load may still read the file
            await asyncio.wait({leaving.task for leaving in self._leaving.values()})

    def usage(self, digest: str) -> dict[str, Any]:
        return {"resident_edits": len(self._made_of([digest])), "in_flight": self._in_use[digest]}

    def _made_of(self, digests: Collection[str]) -> list[str]:
        return [key for key, resident in self._residents.items() if not resident.item.artifacts.isdisjoint(digests)]
