"""The middle tier: files of deltas kept in RAM as they are, so that making one resident again reads no disk.

A copy lives in an anonymous file (`memfd_create`), which the engine's processes open by its path under /proc and map like any
other: there is one copy however many workers there are, and its memory is the kernel's again as soon as it is dropped. A file is
read once, in a thread; the least recently read copies go first, and none that a load is waiting for or reading.
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from server.core import GatewayError
from server.engine.base import EngineDelta
from server.metrics.residency import DeltaMetrics, Reason

_CHUNK_BYTES = 8 << 20

Fetch = Callable[[str], Awaitable[None]]  # a digest -> its object is a local file. Raises GatewayError

log = logging.getLogger("deltaworks.packed")


@dataclass(eq=False)
class Copy:
    """A delta's file in RAM, or on its way there: `handle` is None until it is read, and for good where there was no room.

    `used`: a load has had it already, so that the next one reads no disk. `dropped`: it goes as soon as it may.
    """

    reading: asyncio.Task[None] = field(init=False)
    claims: int = 0
    nbytes: int = 0
    handle: int | None = None
    used: bool = False
    dropped: bool = False


async def is_local(digest: str) -> None:
    """Of a store that is a folder."""


class PackedDeltas:
    """Copies by digest, at most `max_bytes` of them; 0 keeps none."""

    def __init__(self, max_bytes: int, metrics: DeltaMetrics, fetch: Fetch = is_local) -> None:
        self.max_bytes = max_bytes
        self._fetch = fetch
        self._metrics = metrics
        self._copies: dict[str, Copy] = {}  # least recently claimed first

    @property
    def nbytes(self) -> int:
        """What the copies take, those that are being read included."""
        return sum(copy.nbytes for copy in self._copies.values())

    def digests(self) -> list[str]:
        """Of the deltas that are in RAM in full."""
        return [digest for digest, copy in self._copies.items() if copy.handle is not None]

    @contextmanager
    def claim(self, delta: EngineDelta) -> Iterator[Copy | None]:
        """The copy of a delta, which stays inside the block; starts reading it. None where the tier is off."""
        if not self.max_bytes:
            yield None
            return
        copy = self._copies.pop(delta.digest, None)
        if copy is None:
            copy = Copy()
            copy.reading = asyncio.create_task(self._read(delta, copy))
        self._copies[delta.digest] = copy
        copy.dropped = False
        copy.claims += 1
        try:
            yield copy
        finally:
            copy.claims -= 1
            if not copy.claims and copy.reading.done() and (copy.dropped or copy.handle is None):
                self._free(delta.digest, copy)

    async def path(self, delta: EngineDelta, copy: Copy | None) -> str:
        """Where to read a claimed delta from: its copy once that is complete, or the store where there is no room for one.

        Raises what fetching it from the store raises.
        """
        if copy is not None:
            await asyncio.shield(copy.reading)
        if copy is None or copy.handle is None:
            await self._fetch(delta.digest)
            return delta.path
        return f"/proc/{os.getpid()}/fd/{copy.handle}"

    def drop(self, digests: Collection[str], reason: Reason = "unload") -> None:
        """Free copies; one that a load still reads goes when that is done."""
        for digest in digests:
            copy = self._copies.get(digest)
            if copy is not None:
                if not copy.dropped:
                    self._metrics.count_eviction(reason, "ram")
                copy.dropped = True
                if not copy.claims and copy.reading.done():
                    self._free(digest, copy)

    async def close(self) -> None:
        """Stop reading and free everything."""
        for copy in self._copies.values():
            copy.reading.cancel()
        await asyncio.gather(*(copy.reading for copy in self._copies.values()), return_exceptions=True)
        for digest, copy in list(self._copies.items()):
            self._free(digest, copy)

    async def _read(self, delta: EngineDelta, copy: Copy) -> None:
        """Fill a copy. Where the file cannot be read it stays empty, and the load that reads the store itself will say why."""
        started = time.perf_counter()
        try:
            await self._fetch(delta.digest)
            nbytes = await asyncio.to_thread(os.path.getsize, delta.path)
            if self._make_room(nbytes):
                copy.nbytes = nbytes
                copy.handle = await asyncio.to_thread(_copy_to_memory, delta.path, delta.digest)
                self._metrics.read_seconds.observe(time.perf_counter() - started)
        except (OSError, GatewayError) as error:
            copy.nbytes = 0
            log.warning("delta %.12s is not kept in RAM: %s", delta.digest, error)
        if not copy.claims and (copy.dropped or copy.handle is None):
            self._free(delta.digest, copy)
        self._show()

    def _make_room(self, nbytes: int) -> bool:
        """Free idle copies, least recently claimed first; False, and nothing freed, where that would be too little."""
        excess = self.nbytes + nbytes - self.max_bytes
        if nbytes > self.max_bytes:
            log.warning("a delta of %d bytes exceeds engine.max_packed_delta_bytes = %d", nbytes, self.max_bytes)
            return False
        victims = []
        for digest, copy in self._copies.items():
            if excess <= 0:
                break
            if copy.handle is not None and not copy.claims:
                victims.append((digest, copy))
                excess -= copy.nbytes
        if excess > 0:
            return False
        for digest, copy in victims:
            self._metrics.count_eviction("budget", "ram")
            self._free(digest, copy)
        return True

    def _free(self, digest: str, copy: Copy) -> None:
        if self._copies.get(digest) is copy:
            del self._copies[digest]
        if copy.handle is not None:
            os.close(copy.handle)
            copy.handle = None
        self._show()

    def _show(self) -> None:
        self._metrics.show_packed(len(self.digests()), self.nbytes)


def _copy_to_memory(path: str, name: str) -> int:
    """An open anonymous file with the bytes of `path`. Blocking. Raises OSError."""
    handle = os.memfd_create(name[:12])
    try:
        with open(path, "rb") as file:
            while os.sendfile(handle, file.fileno(), None, _CHUNK_BYTES):
                pass
    except BaseException:
        os.close(handle)
        raise
    return handle
