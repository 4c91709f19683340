"""The tier in RAM: budget, order, claims, what is read how often, and memory that is gone when it is freed."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from server.artifacts.packed import PackedDeltas
from server.engine.base import EngineDelta
from server.telemetry import Telemetry

pytestmark = pytest.mark.anyio

MIB = 1 << 20


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry(CollectorRegistry())


@pytest.fixture
def delta(tmp_path: Path) -> Callable[..., EngineDelta]:
    def delta(name: str, nbytes: int = 10) -> EngineDelta:
        path = tmp_path / name
        path.write_bytes(os.urandom(nbytes))
        return EngineDelta(name, str(path))

    return delta


async def content(tier: PackedDeltas, delta: EngineDelta) -> tuple[bool, bytes]:
    """Whether it came from RAM, and the bytes."""
    with tier.claim(delta) as copy:
        path = await tier.path(delta, copy)
        return path != delta.path, Path(path).read_bytes()


async def test_a_copy_has_the_bytes_and_needs_no_disk(telemetry: Telemetry, delta: Callable[..., EngineDelta]) -> None:
    tier, large = PackedDeltas(30 * MIB, telemetry.deltas), delta("large", 20 * MIB + 7)
    expected = Path(large.path).read_bytes()
    assert await content(tier, large) == (True, expected)
    Path(large.path).unlink()
    assert await content(tier, large) == (True, expected)
    await tier.close()


async def test_the_least_recently_claimed_goes_first(telemetry: Telemetry, delta: Callable[..., EngineDelta]) -> None:
    tier, deltas = PackedDeltas(30, telemetry.deltas), {name: delta(name) for name in "abcd"}
    for name in "abcad":
        assert (await content(tier, deltas[name]))[0]
    assert tier.digests() == ["c", "a", "d"]
    assert (
        telemetry.registry.get_sample_value("deltaworks_delta_evictions_total", {"level": "ram", "reason": "budget"})
        == 1
    )
    await tier.close()


async def test_claimed_copies_stay_and_others_read_the_disk(
    telemetry: Telemetry, delta: Callable[..., EngineDelta]
) -> None:
    tier, a, b, c = PackedDeltas(20, telemetry.deltas), delta("a"), delta("b"), delta("c")
    with tier.claim(a) as first, tier.claim(b) as second:
        paths = [await tier.path(a, first), await tier.path(b, second)]
        assert await content(tier, c) == (False, Path(c.path).read_bytes())
        assert [Path(path).read_bytes() for path in paths] == [Path(d.path).read_bytes() for d in (a, b)]
    assert tier.digests() == ["a", "b"]
    assert (await content(tier, c))[0]
    await tier.close()


async def test_a_claimed_copy_that_is_dropped_goes_with_its_last_claim(
    telemetry: Telemetry, delta: Callable[..., EngineDelta]
) -> None:
    tier, a = PackedDeltas(20, telemetry.deltas), delta("a")
    with tier.claim(a) as copy:
        tier.drop(["a"])  # while it is being read
        path = await tier.path(a, copy)
        tier.drop(["a"])
        assert Path(path).read_bytes() == Path(a.path).read_bytes()
    assert (tier.digests(), tier.nbytes) == ([], 0)


async def test_off_and_too_small_read_the_disk(
    telemetry: Telemetry, delta: Callable[..., EngineDelta], caplog: pytest.LogCaptureFixture
) -> None:
    a = delta("a")
    for max_bytes in (0, 9):
        tier = PackedDeltas(max_bytes, telemetry.deltas)
        assert await content(tier, a) == (False, Path(a.path).read_bytes())
        assert (tier.digests(), tier.nbytes) == ([], 0)
    assert "engine.max_packed_delta_bytes = 9" in caplog.text


async def test_a_file_that_is_not_there_is_left_to_the_load(telemetry: Telemetry) -> None:
    tier, gone = PackedDeltas(100, telemetry.deltas), EngineDelta("gone", "/nowhere/gone")
    with tier.claim(gone) as copy:
        assert await tier.path(gone, copy) == "/nowhere/gone"
    assert tier.nbytes == 0
    await tier.close()


async def test_many_claims_are_one_read(telemetry: Telemetry, delta: Callable[..., EngineDelta]) -> None:
    tier, a = PackedDeltas(100, telemetry.deltas), delta("a")
    await asyncio.gather(*(content(tier, a) for _ in range(50)))
    assert telemetry.registry.get_sample_value("deltaworks_delta_read_duration_seconds_count") == 1
    await tier.close()


async def test_memory_is_gone_when_a_copy_is_dropped(telemetry: Telemetry, delta: Callable[..., EngineDelta]) -> None:
    """The kernel frees an anonymous file with its last handle."""
    tier, large = PackedDeltas(30 * MIB, telemetry.deltas), delta("large", 20 * MIB)
    with tier.claim(large) as copy:
        path = Path(await tier.path(large, copy))
    assert (tier.nbytes, path.stat().st_blocks * 512) == (20 * MIB, 20 * MIB)
    tier.drop(["large"])
    assert tier.nbytes == 0
    assert not any(os.readlink(entry).startswith("/memfd:large") for entry in handles())


def handles() -> list[str]:
    """Links of the open files of this process."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [link for link in links if os.path.islink(link)]
