"""Residency: single flight, least recently used, leases, and waiting for room."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from server.artifacts.combination_pool import CombinationPool
from server.artifacts.delta_pool import DeltaPool
from server.artifacts.pool import ArtifactInUse, NoCapacity
from server.engine.base import EngineDelta
from server.telemetry import Telemetry

pytestmark = pytest.mark.anyio


class Loader:
    """Only the half of an engine that the pool uses."""

    def __init__(self) -> None:
        self.resident: set[str] = set()
        self.most = 0
        self.loads: list[str] = []
        self.fail = False

    async def load(self, delta: EngineDelta) -> int:
        self.loads.append(delta.digest)
        self.resident.add(delta.digest)
        self.most = max(self.most, len(self.resident))
        await asyncio.sleep(0.002)
        if self.fail:
            self.resident.discard(delta.digest)
            raise RuntimeError("broken")
        return 10

    async def unload(self, delta: EngineDelta) -> None:
        await asyncio.sleep(0.002)
        self.resident.remove(delta.digest)


@pytest.fixture
def engine() -> Loader:
    return Loader()


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry(CollectorRegistry())


@pytest.fixture
async def pool(engine: Any, telemetry: Telemetry) -> AsyncGenerator[DeltaPool, None]:
    combinations = CombinationPool(engine, 2, 0.5, telemetry.combinations)
    pool = DeltaPool(engine, 2, 0.5, telemetry.deltas, combinations)
    yield pool
    await pool.close()


def delta(name: str) -> EngineDelta:
    return EngineDelta(name, f"/nowhere/{name}")


def value(telemetry: Telemetry, name: str, **labels: str) -> float | None:
    return telemetry.registry.get_sample_value(f"deltaworks_{name}", labels)


async def test_fifty_first_requests_are_one_load(pool: DeltaPool, engine: Loader) -> None:
    async def use() -> None:
        async with pool.lease(delta("a")):
            assert "a" in engine.resident

    await asyncio.gather(*(use() for _ in range(50)))
    assert engine.loads == ["a"]
    assert pool.leases("a") == 0


async def test_the_least_recently_leased_goes_first(pool: DeltaPool, engine: Loader, telemetry: Telemetry) -> None:
    for name in ("a", "b", "a", "c"):
        await pool.load(delta(name))
    assert engine.resident == {"a", "c"}
    assert engine.most == 2
    assert value(telemetry, "delta_evictions_total", level="engine", reason="lru") == 1
    assert value(telemetry, "delta_slots_used", level="engine") == 2
    assert value(telemetry, "delta_resident_bytes", level="engine") == 20


async def test_a_leased_delta_is_never_evicted(pool: DeltaPool, engine: Loader) -> None:
    async with pool.lease(delta("a")):
        for name in ("b", "c", "d"):
            await pool.load(delta(name))
        assert "a" in engine.resident
    assert engine.most == 2


async def test_waiting_ends_when_a_lease_ends(pool: DeltaPool, engine: Loader) -> None:
    async def hold(name: str, seconds: float) -> None:
        async with pool.lease(delta(name)):
            await asyncio.sleep(seconds)

    holders = [asyncio.create_task(hold("a", 0.05)), asyncio.create_task(hold("b", 0.3))]
    await asyncio.sleep(0.01)
    async with pool.lease(delta("c")):
        assert engine.resident == {"b", "c"}
    await asyncio.gather(*holders)


async def test_no_room_in_time_is_an_error(engine: Any, telemetry: Telemetry) -> None:
    combinations = CombinationPool(engine, 1, 0.02, telemetry.combinations)
    pool = DeltaPool(engine, 1, 0.02, telemetry.deltas, combinations)
    async with pool.lease(delta("a")):
        with pytest.raises(NoCapacity) as caught:
            await pool.load(delta("b"))
    assert caught.value.retry_after_s == 2
    assert pool.leases("b") == 0
    await pool.load(delta("b"))


async def test_failed_load_reaches_every_waiter_and_frees_the_slot(
    pool: DeltaPool, engine: Loader, telemetry: Telemetry
) -> None:
    engine.fail = True
    results = await asyncio.gather(*(pool.load(delta("a")) for _ in range(3)), return_exceptions=True)
    assert [str(result) for result in results] == ["broken"] * 3
    assert pool.residents() == []
    engine.fail = False
    await pool.load(delta("a"))
    assert (
        value(telemetry, "delta_loads_total", source="disk", outcome="error"),
        value(telemetry, "delta_loads_total", source="disk", outcome="ok"),
    ) == (1, 1)


async def test_drop_waits_for_leases(pool: DeltaPool, engine: Loader) -> None:
    async with pool.lease(delta("a")):
        with pytest.raises(ArtifactInUse):
            await pool.drop(["a"], wait_s=0)
        waiting = asyncio.create_task(pool.drop(["a"], wait_s=5))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        assert "a" in engine.resident
    await waiting
    assert engine.resident == set()


async def test_lease_while_the_delta_leaves_loads_it_again(pool: DeltaPool, engine: Loader) -> None:
    await pool.load(delta("a"))
    dropping = asyncio.create_task(pool.drop(["a"], wait_s=0))
    await asyncio.sleep(0)
    async with pool.lease(delta("a")):
        assert engine.resident == {"a"}
    await dropping
    assert engine.loads == ["a", "a"]


async def test_drop_of_a_load_that_nobody_waits_for(pool: DeltaPool, engine: Loader) -> None:
    impatient = asyncio.create_task(pool.load(delta("a")))
    await asyncio.sleep(0.001)
    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)
    await pool.drop(["a"], wait_s=0)
    assert engine.resident == set()
    assert pool.residents() == []


async def test_churn_never_exceeds_the_capacity(pool: DeltaPool, engine: Loader) -> None:
    async def use(name: str) -> None:
        async with pool.lease(delta(name)):
            assert name in engine.resident
            await asyncio.sleep(0.001)
            assert name in engine.resident

    await asyncio.gather(*(use(name) for name in "abcdeabcdecab"))
    assert engine.most == 2
