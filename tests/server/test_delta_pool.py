"""Residency of deltas by bytes: budgets of both tiers in memory, order of waiting, pins, failed loads, sizes that do not fit."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from server.artifacts.combination_pool import CombinationPool
from server.artifacts.delta_pool import DeltaPool, DeltaTooLarge, PinLimit
from server.artifacts.pool import NoCapacity
from server.engine.base import EngineDeadError, EngineDelta, EngineLoadError
from server.telemetry import Telemetry

pytestmark = pytest.mark.anyio


class Loader:
    """The half of an engine that the pool uses; a delta takes ten bytes a byte of its file. Notes what it reads from where."""

    def __init__(self) -> None:
        self.resident: dict[str, int] = {}
        self.most_bytes = self.most = 0
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.measured: list[str] = []
        self.paths: list[str] = []
        self.error: Exception | None = None
        self.gate: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0.001)
        self.leased: Callable[[str], int] = lambda digest: 0

    async def measure(self, delta: EngineDelta) -> int:
        self.measured.append(delta.digest)
        await asyncio.sleep(0)
        return 10 * len(Path(delta.path).read_bytes())

    async def load(self, delta: EngineDelta) -> int:
        self.loads.append(delta.digest)
        self.paths.append(delta.path)
        if self.error is not None:
            raise self.error
        nbytes = 10 * len(Path(delta.path).read_bytes())
        self.resident[delta.digest] = nbytes
        self.most = max(self.most, len(self.resident))
        self.most_bytes = max(self.most_bytes, sum(self.resident.values()))
        await self.gate()
        return nbytes

    async def unload(self, delta: EngineDelta) -> None:
        assert not self.leased(delta.digest), "a leased delta is dropped"
        self.unloads.append(delta.digest)
        await asyncio.sleep(0.001)
        assert not self.leased(delta.digest) or delta.digest in self.resident
        del self.resident[delta.digest]


@pytest.fixture
def engine() -> Loader:
    return Loader()


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry(CollectorRegistry())


@pytest.fixture
def delta(tmp_path: Path) -> Callable[..., EngineDelta]:
    def delta(name: str, nbytes: int = 10) -> EngineDelta:
        path = tmp_path / name
        if not path.exists():
            path.write_bytes(b"x" * nbytes)
        return EngineDelta(name, str(path))

    return delta


@pytest.fixture
def make(engine: Any, telemetry: Telemetry) -> Callable[..., DeltaPool]:
    def make(**limits: Any) -> DeltaPool:
        wait_s, max_resident = limits.pop("wait_s", 5.0), limits.pop("max_resident", 100)
        combinations = CombinationPool(engine, 4, wait_s, telemetry.combinations)
        pool = DeltaPool(engine, max_resident, wait_s, telemetry.deltas, combinations, **limits)
        engine.leased = pool.leases
        return pool

    return make


def value(telemetry: Telemetry, name: str, **labels: str) -> float | None:
    return telemetry.registry.get_sample_value(f"deltaworks_{name}", labels)


async def test_bytes_decide_and_the_count_still_holds(make: Any, engine: Loader, delta: Any) -> None:
    pool = make(max_bytes=300, max_resident=3)
    for name, nbytes in (("a", 10), ("b", 10), ("big", 20), ("c", 1), ("d", 1), ("e", 1)):
        await pool.load(delta(name, nbytes))
    assert engine.unloads == ["a", "b", "big"]
    assert (engine.most_bytes, engine.most) == (300, 3)
    await pool.close()


async def test_one_large_delta_takes_the_room_of_several(make: Any, engine: Loader, delta: Any) -> None:
    pool = make(max_bytes=300)
    for name in "abc":
        await pool.load(delta(name))
    await pool.load(delta("big", 25))
    assert engine.unloads == ["a", "b", "c"]
    assert engine.most_bytes == 300
    await pool.close()


async def test_a_delta_larger_than_the_budget_names_setting_and_size(make: Any, engine: Loader, delta: Any) -> None:
    pool = make(max_bytes=300, max_packed_bytes=1000)
    await pool.load(delta("a"))
    with pytest.raises(DeltaTooLarge, match=r"engine.max_resident_delta_bytes is 300: it must be at least 310"):
        await pool.load(delta("big", 31))
    assert (engine.loads, engine.unloads) == (["a"], [])
    assert pool.state("big") == ("packed", None)
    await pool.close()


async def test_nothing_goes_where_it_would_not_be_enough(make: Any, engine: Loader, delta: Any) -> None:
    pool = make(max_bytes=300, wait_s=0.5)
    await pool.load(delta("idle"))
    async with pool.lease(delta("busy", 20)):
        with pytest.raises(NoCapacity):
            await pool.load(delta("big", 25))
    assert engine.unloads == []
    await pool.load(delta("big", 25))
    await pool.close()


async def test_who_waits_is_not_overtaken(make: Any, engine: Loader, delta: Any) -> None:
    """Small deltas that come later and would fit do not take the room that a large one waits for."""
    pool = make(max_bytes=300)
    order: list[str] = []

    async def use(name: str, nbytes: int) -> None:
        async with pool.lease(delta(name, nbytes)):
            order.append(name)

    async with pool.lease(delta("busy", 20)):
        waiting = [asyncio.create_task(use("big", 25))]
        await asyncio.sleep(0.01)
        waiting += [asyncio.create_task(use(name, 5)) for name in "abc"]
        await asyncio.sleep(0.02)
        assert order == []
    await asyncio.gather(*waiting)
    assert order[0] == "big"
    await pool.close()


async def test_sizes_are_measured_once_and_only_with_a_budget(make: Any, engine: Loader, delta: Any) -> None:
    pool = make(max_bytes=100)
    await asyncio.gather(*(pool.load(delta("a")) for _ in range(9)))
    await pool.load(delta("b"))
    await pool.load(delta("a"))
    assert engine.measured == ["a", "b"]
    await pool.close()
    free = make()
    await free.load(delta("c"))
    assert engine.measured == ["a", "b"]
    await free.close()


async def test_the_second_load_reads_ram(make: Any, engine: Loader, delta: Any, telemetry: Telemetry) -> None:
    pool = make(max_resident=1, max_packed_bytes=1000)
    await pool.load(delta("a"))
    await pool.load(delta("b"))
    Path(delta("a").path).unlink()
    await pool.load(EngineDelta("a", "/gone"))
    assert [path.startswith("/proc/") for path in engine.paths] == [True] * 3
    counts = [value(telemetry, "delta_loads_total", source=source, outcome="ok") for source in ("disk", "ram")]
    assert counts == [2, 1]
    assert value(telemetry, "delta_resident_bytes", level="ram") == 20
    await pool.close()
    assert value(telemetry, "delta_resident_bytes", level="ram") == 0


async def test_a_waiting_request_reads_ahead(make: Any, engine: Loader, delta: Any) -> None:
    pool = make(max_resident=1, max_packed_bytes=1000)
    async with pool.lease(delta("a")):
        waiting = asyncio.create_task(pool.load(delta("b")))
        async with asyncio.timeout(4):
            while pool.state("b") != ("packed", None):
                await asyncio.sleep(0.001)
        assert (engine.loads, waiting.done()) == (["a"], False)
    await waiting
    await pool.close()


async def test_fifty_first_requests_are_one_read_one_measure_one_load(make: Any, engine: Loader, delta: Any) -> None:
    pool = make(max_bytes=1000, max_packed_bytes=1000)
    await asyncio.gather(*(pool.load(delta("a")) for _ in range(50)))
    assert (engine.measured, engine.loads) == (["a"], ["a"])
    await pool.close()


@pytest.mark.slow
async def test_r6_failed_load_is_remembered_for_its_time_and_no_longer(
    make: Any, engine: Loader, delta: Any, telemetry: Telemetry
) -> None:
    pool = make(failed_load_s=1.0)
    engine.error = EngineLoadError("broken")
    for _ in range(3):
        with pytest.raises(EngineLoadError, match="broken"):
            async with pool.lease(delta("a")):
                pass
    assert engine.loads == ["a"]
    assert (pool.state("a")[0], value(telemetry, "delta_lookups_total", result="negative")) == ("failed", 2)
    engine.error = None
    await asyncio.sleep(1.01)
    async with pool.lease(delta("a")):
        assert pool.state("a")[0] == "resident"
    await pool.close()


async def test_only_the_deltas_own_failure_is_remembered(make: Any, engine: Loader, delta: Any) -> None:
    pool = make(failed_load_s=100)
    engine.error = EngineDeadError("the engine stopped")
    for _ in range(2):
        with pytest.raises(EngineDeadError):
            async with pool.lease(delta("a")):
                pass
    assert engine.loads == ["a", "a"]
    engine.error = EngineLoadError("broken")
    with pytest.raises(EngineLoadError):
        await pool.load(delta("a"))
    engine.error = None
    await pool.load(delta("b"))
    await pool.load(delta("a"))  # by hand: tried at once
    await pool.close()


async def test_a_pinned_delta_stays(make: Any, engine: Loader, delta: Any, telemetry: Telemetry) -> None:
    pool = make(max_resident=2)
    pool.keep([delta("pin")])
    for name in "abcd":
        await pool.load(delta(name))
    assert engine.unloads == ["a", "b", "c"]
    assert value(telemetry, "delta_pinned") == 1
    pool.keep([])
    await pool.load(delta("e"))
    assert engine.unloads[-1] == "pin"
    await pool.close()


async def test_pins_leave_room_for_one_more(make: Any, engine: Loader, delta: Any) -> None:
    by_count, by_bytes = make(max_resident=2), make(max_bytes=300)
    for pool, setting in ((by_count, "max_resident_deltas"), (by_bytes, "max_resident_delta_bytes")):
        await pool.check_pin(delta("a"))
        await pool.load(delta("a"))
        pool.keep([delta("a")])
        await pool.check_pin(delta("a"))
        with pytest.raises(PinLimit, match=setting):
            await pool.check_pin(delta("b", 11))
        await pool.close()
        engine.resident.clear()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_schedules_never_drop_a_leased_delta(seed: int, tmp_path: Path) -> None:
    """Random sizes, holds, cancellations, unloads and pins: leases hold, budgets hold, nothing is left behind."""

    async def run() -> None:
        draw, engine, telemetry = random.Random(seed), Loader(), Telemetry(CollectorRegistry())
        combinations = CombinationPool(engine, 4, 20.0, telemetry.combinations)
        pool = DeltaPool(engine, 5, 20.0, telemetry.deltas, combinations, max_bytes=400, max_packed_bytes=60)
        engine.leased = lambda digest: held[digest]
        held: Counter[str] = Counter()
        deltas = []
        for number in range(12):
            path = tmp_path / f"{number}"
            path.write_bytes(b"x" * draw.randint(1, 20))
            deltas.append(EngineDelta(f"{number}", str(path)))

        async def use() -> None:
            await asyncio.sleep(draw.random() * 0.1)
            delta = draw.choice(deltas)
            async with pool.lease(delta):
                held[delta.digest] += 1
                try:
                    for _ in range(draw.randint(1, 4)):
                        assert engine.resident[delta.digest] == 10 * Path(delta.path).stat().st_size
                        await asyncio.sleep(draw.random() * 0.004)
                    assert delta.digest in engine.resident
                finally:
                    held[delta.digest] -= 1

        async def meddle() -> None:
            for _ in range(30):
                await asyncio.sleep(draw.random() * 0.01)
                if draw.random() < 0.5:
                    await asyncio.gather(pool.drop([draw.choice(deltas).digest], 0), return_exceptions=True)
                else:
                    pool.keep(draw.sample(deltas, draw.randint(0, 1)))

        async def cancel(tasks: list[asyncio.Task[None]]) -> None:
            for task in draw.sample(tasks, 40):
                await asyncio.sleep(draw.random() * 0.003)
                task.cancel()

        tasks = [asyncio.create_task(use()) for _ in range(200)]
        await asyncio.gather(meddle(), cancel(tasks))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        problems = [result for result in results if isinstance(result, Exception)]
        assert problems == []
        assert engine.most_bytes <= 400
        assert engine.most <= 5
        pool.keep([])
        await pool.drop([delta.digest for delta in deltas], 5)
        assert (engine.resident, pool.packed.nbytes, pool.residents()) == ({}, 0, [])
        await pool.close()

    asyncio.run(run())
