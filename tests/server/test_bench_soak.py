"""The bench that soaks a gateway: its traffic against a gateway over the fake engine, what it counts, and what it calls a fault."""

import asyncio
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.bench.soak import quantile
from server.bench.traffic import Traffic
from server.child import Child
from server.config import Settings


@pytest.fixture
def settings() -> Settings:
    return Settings.model_validate({"auth": {"admin_keys": "admin-key"}})


@pytest.fixture
def traffic(live: Any, child: Child, tmp_path: Path) -> Traffic:
    live.house.tokenizer.vocab_size = 50_000
    live.house.engine.max_model_len = 512
    live.house.engine.words = tuple("abcdefghijklmnopqrstuvwxyz")
    versions = [tmp_path / "a", tmp_path / "b"]
    for path in versions:
        path.write_bytes(path.name.encode())
    return Traffic(child, ["tiny-base"], versions)


def soak(traffic: Traffic, enough: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    asyncio.run(traffic.everything(lambda: enough() or time.monotonic() >= end, 2))


def test_everything_at_once_is_answered_and_counted(live: Any, traffic: Traffic) -> None:
    live.house.engine.step_s = 0.002

    def fewest() -> int:
        return min(traffic.answered, traffic.moved, traffic.left, traffic.killed, len(traffic.probe_ms))

    soak(traffic, lambda: fewest() > 0)
    assert traffic.faults == []
    assert fewest() > 0
    assert live.wait_idle()
    [card] = httpx.get(f"{live.url}/v1/admin/deltas", headers=traffic.child.admin_headers).json()["data"]
    assert (card["name"], len(card["versions"])) == ("moving", 1)


def test_what_goes_wrong_is_a_fault_in_words(live: Any, traffic: Traffic) -> None:
    live.house.engine.fail_at = 3
    soak(traffic, lambda: len(traffic.faults) > 2)
    assert traffic.answered == 0
    assert any("the engine failed" in fault for fault in traffic.faults)
    assert live.wait_idle()


def test_a_quantile_is_of_what_was_counted_between_the_scrapes() -> None:
    before = {0.01: 5.0, 0.1: 5.0, math.inf: 5.0}
    after = {0.01: 5.0, 0.1: 15.0, math.inf: 15.0}
    assert quantile(0.5, before, after) == pytest.approx(0.055)
    assert quantile(0.95, before, after) == pytest.approx(0.0955)
    assert math.isnan(quantile(0.95, before, before))
