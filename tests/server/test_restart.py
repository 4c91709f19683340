"""An engine that dies: who is told what, and how the server gets it back."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest

from server.engine.base import EngineError

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

CHAT = {"model": "tiny-base", "messages": [{"role": "user", "content": "hi"}]}
RESTART = {"max_restarts": 3, "backoff_s": 0.02, "reset_s": 60, "stall_s": 0.4}


@pytest.fixture
async def house(build: Callable[..., Any], settings: Any) -> AsyncGenerator[Any, None]:
    engine = settings.engine.model_copy(update={"restart": settings.engine.restart.model_validate(RESTART)})
    house = build(settings=settings.model_copy(update={"engine": engine}))
    await house.gateway.start()
    yield house
    await house.gateway.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def restarts(house: Any, outcome: str) -> float:
    registry = house.context.telemetry.registry
    return registry.get_sample_value("deltaworks_engine_restarts_total", {"outcome": outcome})


async def test_readiness_is_red_at_once_liveness_stays_and_requests_are_told_when_to_come_back(
    client: httpx.AsyncClient, house: Any
) -> None:
    house.engine.start_s = 0.3
    house.engine.dead = True  # nobody has had a turn of the loop to notice
    ready = await client.get("/health/ready")
    assert (ready.status_code, ready.json()) == (503, {"status": "engine_dead"})
    assert int(ready.headers["retry-after"]) >= 1
    assert (await client.get("/health/live")).status_code == 200
    refused = await client.post("/v1/chat/completions", json=CHAT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
    assert refused.headers["retry-after"] == "1"
    registry = house.context.telemetry.registry
    assert registry.get_sample_value("deltaworks_engine_up") == 0
    await until(lambda: house.gateway.state == "ready")
    assert (await client.get("/health/ready")).status_code == 200
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    assert (house.engine.starts, restarts(house, "ok"), restarts(house, "error")) == (2, 1, 0)
    assert registry.get_sample_value("deltaworks_engine_up") == 1


async def test_running_requests_fail_with_a_true_status_or_an_error_event(
    client: httpx.AsyncClient, house: Any
) -> None:
    house.engine.block_at = 0
    waiting = [
        asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"stream": s})) for s in (False, True)
    ]
    await until(lambda: len(house.engine.running) == 2)
    house.engine.block_at = 2
    begun = [asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"stream": s})) for s in (False, True)]
    await until(lambda: len(house.engine.running) == 4)
    await asyncio.sleep(0.02)
    house.engine.block_at = None
    house.engine.die()
    whole, streamed = await asyncio.gather(*begun)
    for response in (*(await asyncio.gather(*waiting)), whole):
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
        assert response.headers["retry-after"] == "1"
    assert streamed.status_code == 200
    *chunks, error, done = [line for line in streamed.text.split("\n\n") if line]
    assert done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_dead"
    assert not any('"finish_reason":"' in chunk for chunk in chunks)
    assert house.idle()


async def test_deltas_and_pins_come_back_without_being_asked_for(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, upload: Any, house: Any
) -> None:
    digests = [(await upload(name, name.encode())).json()["digest"] for name in ("red", "blue", "green")]
    assert (await admin.post("/v1/admin/deltas/red/pin")).status_code == 200
    for name in ("green", "blue"):  # there is room for two
        assert (await client.post("/v1/completions", json={"model": name, "prompt": "a"})).status_code == 200
    house.engine.loads.clear()
    house.engine.die()
    await until(lambda: restarts(house, "ok") == 1 and len(house.engine.loads) == 2)
    assert set(house.engine.loads) == set(digests[:2])
    body = {"model": "blue", "prompt": "a"}
    assert (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"].startswith(digests[1][:6])
    assert len(house.engine.loads) == 2
    status = (await admin.get("/v1/admin/status")).json()
    assert {resident["digest"] for resident in status["resident"]} == set(digests[:2])


async def test_an_engine_that_dies_in_a_row_loads_only_what_is_asked_for(
    client: httpx.AsyncClient, upload: Any, house: Any
) -> None:
    await upload("red", b"red")
    body = {"model": "red", "prompt": "a"}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    for deaths in (1, 2):
        house.engine.loads.clear()
        house.engine.die()
        await until(lambda deaths=deaths: restarts(house, "ok") == deaths)
        await asyncio.sleep(0.02)
        assert len(house.engine.loads) == (deaths == 1)
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert len(house.engine.loads) == 1


async def test_the_wait_grows_with_every_start_that_fails_and_then_the_engine_is_given_up(
    client: httpx.AsyncClient, house: Any
) -> None:
    house.engine.start_errors = [EngineError("no memory")] * 3
    loop = asyncio.get_running_loop()
    started = loop.time()
    house.engine.die()
    await until(lambda: house.gateway.supervisor.given_up)
    assert loop.time() - started >= 0.02 + 0.04 + 0.08
    assert (house.engine.starts, restarts(house, "ok"), restarts(house, "error")) == (4, 0, 3)
    for path in ("/health/live", "/health/ready"):
        response = await client.get(path)
        assert (response.status_code, response.json()["status"]) == (503, "engine_dead")
    refused = await client.post("/v1/chat/completions", json=CHAT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
    assert "retry-after" not in refused.headers


async def test_a_delta_that_is_loading_when_the_engine_dies(client: httpx.AsyncClient, upload: Any, house: Any) -> None:
    await upload("red", b"red")
    house.engine.hold_loads = True
    asked = asyncio.create_task(client.post("/v1/completions", json={"model": "red", "prompt": "a"}))
    await until(lambda: bool(house.engine.loads))
    house.engine.die()
    house.engine.hold_loads = False
    refused = await asked
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
    await until(lambda: house.gateway.state == "ready")
    assert (await client.post("/v1/completions", json={"model": "red", "prompt": "a"})).status_code == 200
    assert house.idle()


@pytest.mark.parametrize("loading", [False, True])
async def test_an_engine_that_makes_no_step_is_killed_and_restarted_as_a_dead_one(
    client: httpx.AsyncClient, upload: Any, house: Any, caplog: pytest.LogCaptureFixture, loading: bool
) -> None:
    """With a row that it has begun, or a delta that it was to load."""

    def kill() -> None:
        house.engine.block_at, house.engine.hold_loads = None, False
        house.engine.kills += 1
        house.engine.die()

    await upload("red", b"red")
    house.engine.kill = kill
    house.engine.block_at, house.engine.hold_loads = 1, loading
    started = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(10):
            refused = await client.post("/v1/completions", json={"model": "red", "prompt": "a"})
    finally:
        house.engine.hold_loads = False
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
    assert int(refused.headers["retry-after"]) >= 1
    assert 0.3 <= asyncio.get_running_loop().time() - started < 5
    registry = house.context.telemetry.registry
    assert registry.get_sample_value("deltaworks_engine_stalls_total") == house.engine.kills == 1
    assert "the engine has stalled and is killed" in caplog.text
    await until(lambda: house.gateway.state == "ready")
    assert (house.engine.starts, restarts(house, "ok")) == (2, 1)
    assert (await client.post("/v1/completions", json={"model": "red", "prompt": "a"})).status_code == 200
    assert house.engine.kills == 1


async def test_readiness_is_red_from_the_stall_on_whatever_the_kill_does(client: httpx.AsyncClient, house: Any) -> None:
    killed = asyncio.Event()
    house.engine.kill = killed.set  # and it lives on
    house.engine.block_at = 1
    asked = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
    await asyncio.wait_for(killed.wait(), 5)
    assert (await client.get("/health/ready")).json() == {"status": "engine_dead"}
    assert (await client.get("/health/live")).status_code == 200
    refused = await client.post("/v1/chat/completions", json=CHAT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
    house.engine.block_at = None
    house.engine.die()
    assert (await asked).status_code == 503
    await until(lambda: house.gateway.state == "ready")


async def test_what_is_slow_or_idle_or_was_suspended_has_not_stalled(client: httpx.AsyncClient, house: Any) -> None:
    await asyncio.sleep(0.5)  # nothing is owed
    house.engine.step_s, house.engine.words = 0.1, (" a",) * 6
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    house.engine.step_s, house.engine.words, house.engine.hold_at = None, (" a",), 1
    asked = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
    await until(lambda: bool(house.engine.running))
    time.sleep(0.6)
    await asyncio.sleep(0)
    house.engine.hold_at = None
    assert (await asked).status_code == 200
    assert house.engine.kills == 0


async def test_a_stop_during_the_restart_is_clean(build: Callable[..., Any]) -> None:
    house = build()
    await house.gateway.start()
    house.engine.start_s = 0.1
    house.engine.die()
    await until(lambda: house.gateway.state == "engine_dead")
    await house.gateway.stop()
    assert house.gateway.state == "draining"
