"""Residency of combinations: weighted sums of resident deltas, of which the engine holds little more than coefficients."""

from server.artifacts.pool import Pool
from server.engine.base import EngineDelta


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
