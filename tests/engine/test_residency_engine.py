"""Residency on the real engine: many deltas, room for four, every answer right, and memory that falls when deltas leave."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from compressors.baselines import BitDeltaConfig
from compressors.compress import compress
from compressors.footprint import execution_nbytes
from compressors.impart import ImPartConfig
from server.artifacts.combination_pool import CombinationPool
from server.artifacts.delta_pool import DeltaPool, DeltaTooLarge
from server.engine.base import EngineDelta, EngineLoadError
from server.telemetry import Telemetry
from tests.engine.bed import Answer, Row, Runner, engine_settings
from tests.engine.conftest import fine_tune
from tests.engine.test_truths import assert_same, merged, oracle

pytestmark = pytest.mark.engine

REGISTERED, ROOM, TOKENS = 40, 4, 6
PROMPT = tuple(range(300, 320))
MIB = 1 << 20


@pytest.fixture(scope="module")
def deltas(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[EngineDelta]:
    folder = tmp_path_factory.mktemp("many")
    made = []
    for number in range(REGISTERED):
        path = folder / f"delta-{number}.safetensors"
        tuned = fine_tune(tiny_base, folder / "tuned", seed=100 + number)
        compress(tiny_base, tuned, path, ImPartConfig(ratio=8.0, seed=number))
        made.append(EngineDelta(digest=f"{number:064x}", path=str(path)))
    return made


@pytest.fixture(scope="module")
def expected(tiny_base: Path, deltas: list[EngineDelta]) -> dict[str, Answer]:
    return {delta.digest: oracle(merged(tiny_base, delta), PROMPT, TOKENS) for delta in deltas}


@pytest.fixture(scope="module")
def runner(tiny_base: Path) -> Iterator[Runner]:
    """A small cache: the first requests touch all its pages, and what grows later is no cache."""
    runner = Runner(tiny_base, engine_settings(deltas_per_batch=ROOM, kv_cache_bytes=8 * MIB))
    yield runner
    runner.stop()


def engine_rss(runner: Runner) -> int:
    """Resident bytes of the engine's process, without the files that it maps."""
    (process,) = runner.engine._running().engine_core.resources.engine_manager.processes
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon:"))


def loaded(telemetry: Telemetry, source: str) -> float:
    labels = {"source": source, "outcome": "ok"}
    return telemetry.registry.get_sample_value("deltaworks_delta_loads_total", labels) or 0


def test_zipf_over_forty_with_room_for_four(runner: Runner, deltas: list[EngineDelta], expected: dict[str, Answer]):
    """Sixteen clients at once. The budget of bytes holds all the time, by the engine's own count."""
    sizes = sorted(execution_nbytes(Path(delta.path)) for delta in deltas)
    telemetry, budget, seen = Telemetry(CollectorRegistry()), sum(sizes[-ROOM:]), []
    packed_bytes = sum(Path(delta.path).stat().st_size for delta in deltas[:12])
    combinations = CombinationPool(runner.engine, 4, 60.0, telemetry.combinations)
    pool = DeltaPool(
        runner.engine, 100, 60.0, telemetry.deltas, combinations, max_bytes=budget, max_packed_bytes=packed_bytes
    )
    weights = [1 / (rank + 1) for rank in range(REGISTERED)]
    turns = iter([*range(REGISTERED), *random.Random(0).choices(range(REGISTERED), weights, k=160)])

    async def ask() -> None:
        for index in turns:
            delta = deltas[index]
            async with pool.lease(delta):
                answer = await runner._one(Row(PROMPT, delta, cache_salt=f"{next(salts)}"), TOKENS)
            assert_same(answer, expected[delta.digest])
            seen.append((sum(resident.nbytes or 0 for resident in pool.residents()), pool.packed.nbytes))

    salts = iter(range(10_000))

    async def everyone() -> None:
        await asyncio.gather(*(ask() for _ in range(16)))

    rss, loads = [], []
    for seed in range(4):
        if seed:
            turns = iter(random.Random(seed).choices(range(REGISTERED), weights, k=120))
        runner.loop.run_until_complete(everyone())
        rss.append(engine_rss(runner))
        loads.append([loaded(telemetry, source) for source in ("disk", "ram")])
    assert len(seen) == REGISTERED + 160 + 3 * 120
    assert max(engine for engine, _ in seen) <= budget
    assert max(packed for _, packed in seen) <= packed_bytes
    assert loads[-1][0] >= REGISTERED
    assert loads[-1][1] > 0
    print(f"loads from disk and RAM {loads}, budget {budget}, RSS after each round {rss}")
    passed_through = (sum(loads[-1]) - sum(loads[1])) * sizes[0]  # requests alone let vLLM's heap grow somewhat too
    assert rss[-1] - rss[1] < 0.75 * passed_through
    for resident in pool.residents():
        assert 0 < resident.nbytes <= execution_nbytes(Path(resident.item.path))
    runner.loop.run_until_complete(pool.drop([delta.digest for delta in deltas], 0))
    runner.loop.run_until_complete(pool.close())


def test_r4_memory_falls_when_deltas_leave(runner: Runner, tiny_base: Path, deltas: list[EngineDelta], tmp_path: Path):
    """Thirty dense deltas of about 2 MB come and go, three times; the last but one leave the heap with holes."""
    tuned = fine_tune(tiny_base, tmp_path / "tuned", seed=1)
    compress(tiny_base, tuned, tmp_path / "dense.safetensors", BitDeltaConfig())
    dense = [EngineDelta(f"{number + 1000:064x}", str(tmp_path / "dense.safetensors")) for number in range(30)]
    runner.load(dense[0])
    runner.unload(dense[0])
    start = engine_rss(runner)
    for _ in range(3):
        nbytes = sum(runner.load(delta) for delta in dense)
        full = engine_rss(runner)
        assert full - start > 0.8 * nbytes
        for delta in dense[::2]:
            runner.unload(delta)
        half = engine_rss(runner)
        assert full - half > 0.35 * nbytes
        for delta in dense[1::2]:
            runner.unload(delta)
        print(f"{nbytes} bytes: start {start}, full {full}, half {half}, end {engine_rss(runner)}")
        assert engine_rss(runner) - start < 0.15 * nbytes


def test_damage_and_sizes_are_told(runner: Runner, deltas: list[EngineDelta], tmp_path: Path):
    telemetry = Telemetry(CollectorRegistry())
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(deltas[0].path).read_bytes()[:-9])
    nbytes = execution_nbytes(Path(deltas[0].path))
    combinations = CombinationPool(runner.engine, 4, 1.0, telemetry.combinations)
    pool = DeltaPool(runner.engine, 4, 1.0, telemetry.deltas, combinations, nbytes - 1, 100 * MIB, 60.0)
    with pytest.raises(DeltaTooLarge, match=f"must be at least {nbytes}"):
        runner.loop.run_until_complete(pool.load(deltas[0]))
    for _ in range(2):
        with pytest.raises(EngineLoadError, match="truncated"):
            runner.loop.run_until_complete(lease(pool, EngineDelta("f" * 64, str(cut))))
    runner.loop.run_until_complete(pool.close())


async def lease(pool: DeltaPool, delta: EngineDelta) -> None:
    async with pool.lease(delta):
        pass
