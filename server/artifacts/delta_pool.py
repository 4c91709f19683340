"""Residency of deltas, in three tiers: on the disk (store.py), packed in RAM (packed.py), in execution form in the engine.

A request that is admitted starts reading its delta at once, also while it waits for room in the engine. How much room a delta
needs is measured from its header, once. A load that failed is remembered for some seconds.
"""

import asyncio
import logging
import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from server.artifacts.combination_pool import CombinationPool
from server.artifacts.names import KindError
from server.artifacts.packed import Fetch, PackedDeltas, is_local
from server.artifacts.pool import Pool, Resident
from server.artifacts.registry import DELTA
from server.core import ArtifactState, GatewayError, InvalidRequest
from server.decisions import Swap
from server.engine.base import Engine, EngineDelta, EngineError, EngineLoadError
from server.metrics.residency import DeltaMetrics, Reason

log = logging.getLogger("deltaworks.pool")


class DeltaTooLarge(GatewayError):
    """A delta does not fit into the whole budget; the message names the setting and the size that is needed."""


class PinLimit(KindError):
    """With one more pinned delta there would be no room for any other."""


class DeltaPool(Pool[EngineDelta]):
    """Keys are the deltas' digests. A lease of a combination is one of each of its parts too.

    `failed_load_s`: how long a failed load is not tried again.
    """

    kind = DELTA

    def __init__(
        self,
        engine: Engine,
        max_resident: int,
        wait_s: float,
        metrics: DeltaMetrics,
        combinations: CombinationPool,
        max_bytes: int | None = None,
        max_packed_bytes: int = 0,
        failed_load_s: float = 0.0,
        fetch: Fetch = is_local,
    ) -> None:
        super().__init__(engine, max_resident, wait_s, metrics, max_bytes)
        self.combinations = combinations
        self.packed = PackedDeltas(max_packed_bytes, metrics, fetch)
        self._delta_metrics = metrics
        metrics.show_limits(max_resident, max_bytes, max_packed_bytes)
        self._failed_load_s = failed_load_s
        self._condemned: dict[str, str] = {}  # digest -> what is wrong with its bytes
        self._failed: dict[str, tuple[float, str]] = {}  # digest -> (time of the next try, what went wrong)
        self._sizes: dict[str, int] = {}  # in execution form; true ones of deltas that were resident before
        self._measuring: dict[str, asyncio.Task[int]] = {}
        self._sources: dict[str, str] = {}  # of the loads that are under way
        self._pinned: frozenset[str] = frozenset()
        self._lost: list[EngineDelta] = []  # what the engine had when it died
        self._warming: set[asyncio.Task[None]] = set()

    def key(self, item: EngineDelta) -> str:
        return item.digest

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

    @contextmanager
    def parked(self, item: EngineDelta) -> Iterator[None]:
        if not item.parts:
            with super().parked(item):
                yield
            return
        with ExitStack() as parked:
            for part in item.parts:
                parked.enter_context(super().parked(part.delta))
            parked.enter_context(self.combinations.parked(item))
            yield

    # Loads

    def look_up(self, item: EngineDelta) -> Swap:
        """Where a request finds its delta; of a combination, where it finds the part that is farthest away."""
        order: tuple[Swap, ...] = ("hot", "warm", "cold")
        found = max((self._tier(digest) for digest in self._digests(item)), key=order.index)
        if not any(self.state(digest)[0] == "failed" for digest in self._digests(item)):
            self._delta_metrics.lookups.labels("hit" if found == "hot" else "miss").inc()
        return found

    def _tier(self, digest: str) -> Swap:
        state, _ = self.state(digest)
        return "hot" if state == "resident" else "warm" if digest in self.packed.digests() else "cold"

    def _digests(self, item: EngineDelta) -> list[str]:
        return [part.delta.digest for part in item.parts] or [item.digest]

    def waited(self, swap: Swap, seconds: float) -> None:
        self._delta_metrics.swap_seconds.labels(swap).observe(seconds)

    async def make_resident(self, item: EngineDelta) -> None:
        """Raises NoCapacity, DeltaTooLarge, EngineLoadError, and InvalidRequest for more parts than there is ever room for."""
        if not item.parts:
            await self._make_one_resident(item)
            return
        if len(item.parts) > self.max_resident:
            message = f"this server keeps at most {self.max_resident} deltas in memory, so it cannot combine more"
            raise InvalidRequest(message, param="delta")
        for part in item.parts:
            await self._make_one_resident(part.delta)
        await self.combinations.make_resident(item)

    async def _make_one_resident(self, item: EngineDelta) -> None:
        if item.digest in self._residents:
            await super().make_resident(item)
            return
        self.refuse(item)
        with self.packed.claim(item):  # reads while the request waits for room, and keeps what it has read
            await super().make_resident(item)

    async def load(self, item: EngineDelta) -> None:
        """Warm a delta up, also where it has failed a moment ago. Raises as `make_resident`."""
        self._failed.pop(item.digest, None)
        await super().load(item)

    def refuse(self, item: EngineDelta) -> None:
        """Raises EngineLoadError while a failed load is remembered, or where the stored bytes are known to be bad."""
        if item.digest in self._condemned:
            self._delta_metrics.lookups.labels("negative").inc()
            raise EngineLoadError(self._condemned[item.digest])
        until, reason = self._failed.get(item.digest, (0.0, ""))
        wait_s = until - time.monotonic()
        if wait_s > 0:
            self._delta_metrics.lookups.labels("negative").inc()
            raise EngineLoadError(reason, retry_after_s=math.ceil(wait_s))
        self._failed.pop(item.digest, None)

    async def measure(self, item: EngineDelta) -> int:
        """Raises DeltaTooLarge, EngineLoadError."""
        nbytes = self._sizes.get(item.digest, 0)
        if self.max_bytes is None:
            return nbytes
        if not nbytes:
            task = self._measuring.get(item.digest)
            if task is None:
                task = self._measuring[item.digest] = asyncio.create_task(self._measure(item))
                task.add_done_callback(lambda _: self._measuring.pop(item.digest))
            nbytes = await asyncio.shield(task)
        if nbytes > self.max_bytes:
            raise DeltaTooLarge(
                f"the delta takes {nbytes} bytes in execution form, and engine.max_resident_delta_bytes is "
                f"{self.max_bytes}: it must be at least {nbytes}"
            )
        return nbytes

    async def _measure(self, item: EngineDelta) -> int:
        with self.packed.claim(item) as copy:
            path = await self.packed.path(item, copy)
            try:
                nbytes = await self._engine.measure(replace(item, path=path))
            except EngineLoadError as error:
                self._fail(item, error)
                raise
        self._sizes[item.digest] = nbytes
        return nbytes

    async def engine_load(self, item: EngineDelta) -> int:
        with self.packed.claim(item) as copy:
            path = await self.packed.path(item, copy)
            self._sources[item.digest] = "disk"
            if copy is not None and copy.handle is not None:
                self._sources[item.digest] = "ram" if copy.used else "disk"
                copy.used = True
            try:
                nbytes = await self._engine.load(replace(item, path=path))
            except EngineLoadError as error:
                self._fail(item, error)
                raise
        if self.max_bytes is not None and nbytes > self._sizes.get(item.digest, nbytes):
            log.warning("delta %.12s takes %d bytes, more than was measured", item.digest, nbytes)
        self._sizes[item.digest] = nbytes
        return nbytes

    async def engine_unload(self, item: EngineDelta) -> None:
        await self._engine.unload(item)

    def source(self, item: EngineDelta) -> str:
        return self._sources.get(item.digest, "disk")

    def _fail(self, item: EngineDelta, error: EngineLoadError) -> None:
        self._failed[item.digest] = (time.monotonic() + self._failed_load_s, str(error))

    def forgive(self, digest: str) -> None:
        """Forget that a load failed: the file was uploaded again, or found to be good."""
        self._failed.pop(digest, None)
        self._condemned.pop(digest, None)

    def condemn(self, digest: str, reason: str) -> None:
        """Load a delta no more; one that is resident was read while its bytes were good."""
        self._condemned[digest] = reason

    # Pins

    @property
    def pins(self) -> frozenset[str]:
        return self._pinned

    def pinned(self, key: str) -> bool:
        return key in self._pinned

    async def check_pin(self, item: EngineDelta) -> None:
        """Whether the delta may be pinned beside those that are: one as large must still find room. Raises PinLimit."""
        pins = self._pinned | {item.digest}
        sizes = [self._sizes.get(digest, 0) for digest in self._pinned - {item.digest}] + [await self.measure(item)]
        full = self.max_bytes is not None and sum(sizes) + max(sizes) > self.max_bytes
        if full or len(pins) >= self.max_resident:
            setting = "engine.max_resident_delta_bytes" if full else "engine.max_resident_deltas"
            raise PinLimit(DELTA, f"no other delta would find room beside the pinned ones; see {setting}", param="name")

    def keep(self, deltas: Sequence[EngineDelta]) -> None:
        """Pin these and no others; those that are not resident are loaded in the background."""
        self._pinned = frozenset(delta.digest for delta in deltas)
        self._delta_metrics.pinned.set(len(self._pinned))
        for delta in deltas:
            if delta.digest not in self._residents:
                self._warm_up([delta])

    def _warm_up(self, deltas: Sequence[EngineDelta]) -> None:
        """Load in the background, one after the other."""
        task = asyncio.create_task(self._warm(deltas))
        self._warming.add(task)
        task.add_done_callback(self._warming.discard)

    async def _warm(self, deltas: Sequence[EngineDelta]) -> None:
        for delta in deltas:
            try:
                await self.load(delta)
            except (GatewayError, EngineError) as error:
                log.warning("delta %.12s is not resident: %s", delta.digest, error)

    # The engine's death

    async def reset(self) -> list[EngineDelta]:
        await self.combinations.reset()
        self._lost = await super().reset() or self._lost
        return self._lost

    def restore(self) -> None:
        """Load what the engine had when it died, most recently leased first."""
        self._warm_up(self._lost)
        self._lost = []

    # The admin plane

    async def release(self, kind: str, digests: Sequence[str], wait_s: float) -> None:
        await self.drop(digests, wait_s, "delete")
        for digest in digests:
            self._sizes.pop(digest, None)
            self._condemned.pop(digest, None)

    async def drop(self, keys: Collection[str], wait_s: float, reason: Reason = "unload") -> None:
        await super().drop(keys, wait_s, reason)
        self.packed.drop(keys, reason)
        for key in keys:
            self._failed.pop(key, None)  # not what is wrong with stored bytes: that stays so

    async def close(self) -> None:
        for task in self._warming:
            task.cancel()
        await asyncio.gather(*self._warming, return_exceptions=True)
        await self.combinations.close()
        await super().close()
        await self.packed.close()

    def _leave(self, resident: Resident[EngineDelta]) -> asyncio.Task[None]:
        self.combinations.forget(self.key(resident.item))
        return super()._leave(resident)

    def state(self, digest: str) -> tuple[ArtifactState, int | None]:
        """Also the resident bytes."""
        if digest in self._condemned:
            return "failed", None
        resident = self._residents.get(digest)
        if resident is not None:
            return ("loading", None) if resident.nbytes is None else ("resident", resident.nbytes)
        if self._failed.get(digest, (0.0, ""))[0] > time.monotonic():
            return "failed", None
        return ("packed" if digest in self.packed.digests() else "stored"), None

    def usage(self, digest: str) -> dict[str, Any]:
        state, resident_bytes = self.state(digest)
        return {"state": state, "resident_bytes": resident_bytes, "in_flight": self.leases(digest)}
