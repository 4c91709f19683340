"""Too much, too slow, too long: who is refused, with what, and that the others do not notice."""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn

from server.admission import Admission, Pace, ServerOverloaded
from server.config import Settings
from server.errors import describe
from server.guard import guarded

pytestmark = pytest.mark.slow  # waits, processes and servers of its own

CHAT = {"model": "tiny-base", "messages": [{"role": "user", "content": "hi"}]}
API = {"authorization": "Bearer user-key"}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    changes = {"request_timeout_s": 2.0, "body_timeout_s": 0.2}
    return settings.model_copy(update={"server": settings.server.model_copy(update=changes)})


# Retry-After


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_pace_of_the_last_minute_says_how_long_to_wait() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.wait_s(5) == 1
    for _ in range(10):
        clock.now += 0.5
        pace.add(4)
    assert pace.wait_s(8) == pytest.approx(1.0, rel=0.15)
    clock.now += 1000
    assert pace.wait_s(5) == 1
    pace.add(1)
    clock.now += 50
    pace.add(1)
    assert pace.wait_s(1000) == 60


def test_a_full_server_says_when_there_will_be_room() -> None:
    clock = Clock()
    admission = Admission(4, 1000, clock)
    for _ in range(20):  # a row every 2 seconds
        clock.now += 2
        with admission.permit(1):
            pass
    with admission.permit(4), pytest.raises(ServerOverloaded) as raised, admission.permit(3):
        pass
    headers = describe(raised.value).headers
    assert headers["retry-after"] == "6"
    assert 5500 < int(headers["retry-after-ms"]) <= 6000
    assert "x-should-retry" not in headers


# Deadlines


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_before_the_first_token_is_504(client: httpx.AsyncClient, house: Any, stream: bool) -> None:
    house.engine.block_at = 0
    asked = {"x-request-timeout-ms": "400"}
    started = time.perf_counter()
    response = await client.post("/v1/chat/completions", json=CHAT | {"stream": stream}, headers=asked)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert response.json()["error"]["type"] == "timeout_error"
    assert 0.4 <= time.perf_counter() - started < 3
    assert house.idle()


@pytest.mark.anyio
async def test_a_deadline_after_the_first_token_is_an_error_event(client: httpx.AsyncClient, house: Any) -> None:
    house.engine.block_at = 2
    asked = {"x-request-timeout-ms": "400"}
    response = await client.post("/v1/chat/completions", json=CHAT | {"stream": True}, headers=asked)
    assert response.status_code == 200
    *chunks, error, done = [line for line in response.text.split("\n\n") if line]
    assert (chunks != [], done) == (True, "data: [DONE]")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert (await client.post("/v1/chat/completions", json=CHAT, headers=asked)).status_code == 504
    assert house.idle()


@pytest.mark.anyio
async def test_a_deadline_holds_while_waiting_for_a_turn_or_a_delta(
    client: httpx.AsyncClient, house: Any, upload: Any
) -> None:
    await upload("red", b"red")
    house.engine.hold_loads = True
    asked = {"x-request-timeout-ms": "400"}
    response = await client.post("/v1/completions", json={"model": "red", "prompt": "a"}, headers=asked)
    assert response.status_code == 504
    house.engine.hold_loads = False
    async with house.gateway._turns.turn(None, house.gateway._turns.max_rows, 0):
        response = await client.post("/v1/chat/completions", json=CHAT, headers=asked)
        assert response.status_code == 504
        assert house.context.admission.rows == 0
    assert (await client.post("/v1/chat/completions", json=CHAT, headers=asked)).status_code == 200
    assert house.idle()


@pytest.mark.anyio
async def test_the_servers_own_limit_is_the_most_that_a_request_may_ask_for(build: Any, settings: Settings) -> None:
    short = settings.server.model_copy(update={"request_timeout_s": 0.3})
    house = build(settings=settings.model_copy(update={"server": short}))
    await house.gateway.start()
    house.engine.block_at = 0
    async with house.client() as client:
        for headers in ({}, {"x-request-timeout-ms": "60000"}):
            assert (await client.post("/v1/chat/completions", json=CHAT, headers=headers)).status_code == 504
    await house.gateway.stop()


@pytest.mark.anyio
@pytest.mark.parametrize("asked", ["0", "-1", "1.5", "soon", "", "9" * 10])
async def test_a_time_limit_that_is_none_is_400(client: httpx.AsyncClient, asked: str) -> None:
    response = await client.post("/v1/chat/completions", json=CHAT, headers={"x-request-timeout-ms": asked})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-request-timeout-ms")


# Residency under load


@pytest.mark.anyio
async def test_r5_fifty_first_requests_of_a_delta_load_it_once(build: Any, settings: Settings) -> None:
    admission = settings.admission.model_copy(update={"max_concurrent": 60, "max_queued_tokens": 1000})
    house = build(settings=settings.model_copy(update={"admission": admission}))
    await house.gateway.start()
    async with house.client() as client, house.client({"authorization": "Bearer admin-key"}) as admin:
        sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
        query = {"name": "red", "sha256": sha256}
        assert (await admin.post("/v1/admin/deltas", params=query, content=b"test")).status_code == 201
        house.engine.hold_loads = True
        body = {"model": "red", "prompt": "a"}
        asked = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(50)]
        await until(lambda: house.context.pool.leases(sha256) == 50)
        house.engine.hold_loads = False
        assert [response.status_code for response in await asyncio.gather(*asked)] == [200] * 50
    assert house.engine.loads == [sha256]
    assert house.idle()
    await house.gateway.stop()


@pytest.mark.anyio
async def test_r7_more_deltas_in_flight_than_there_is_room_for(
    client: httpx.AsyncClient, upload: Any, house: Any
) -> None:
    """Two have room. The third is told so after `delta_wait_s`, and gets the room of the first that ends."""
    for name in ("red", "blue", "green"):
        await upload(name, name.encode())
    house.engine.block_at = 1
    bodies = {name: {"model": name, "prompt": "a"} for name in ("red", "blue", "green")}
    running = [asyncio.create_task(client.post("/v1/completions", json=bodies[name])) for name in ("red", "blue")]
    await until(lambda: len(house.engine.running) == 2)
    started = time.perf_counter()
    refused = await client.post("/v1/completions", json=bodies["green"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "delta_capacity")
    assert 0.2 <= time.perf_counter() - started < 5
    assert int(refused.headers["retry-after"]) >= 1
    house.engine.block_at = None
    waiting = asyncio.create_task(client.post("/v1/completions", json=bodies["green"]))
    await asyncio.sleep(0.02)
    running[0].cancel()
    assert (await waiting).status_code == 200
    assert len(house.context.pool.residents()) == 2
    running[1].cancel()
    await asyncio.gather(*running, return_exceptions=True)
    assert house.idle()


@pytest.mark.anyio
async def test_what_waits_for_its_turn_takes_no_room_but_cannot_be_deleted(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, upload: Any, house: Any
) -> None:
    digests = [(await upload(name, name.encode())).json()["digest"] for name in ("red", "blue", "green")]
    bodies = [{"model": name, "prompt": "a"} for name in ("red", "blue", "green")]
    for body in bodies[:2]:
        assert (await client.post("/v1/completions", json=body)).status_code == 200
    turns = house.gateway._turns
    async with turns.turn(None, turns.max_rows, 0):
        waiting = [asyncio.create_task(client.post("/v1/completions", json=body)) for body in bodies]
        await until(lambda: turns.waiting == 3)
        refused = await admin.delete("/v1/admin/deltas/red")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "delta_in_use")
        await house.context.pool.load(house.context.registry.engine_delta(digests[2]))
    assert [response.status_code for response in await asyncio.gather(*waiting)] == [200] * 3
    assert house.idle()


# Real sockets


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The live server as `serve` makes it, with small limits."""
    load = uvicorn.Config.load

    def guarded_load(config: uvicorn.Config) -> None:
        load(config)
        config.http_protocol_class = guarded(config.http_protocol_class, 4096, 0.3)  # type: ignore[assignment]

    monkeypatch.setattr(uvicorn.Config, "load", guarded_load)


@pytest.fixture
def connect(guard: None, live: Any) -> Iterator[Callable[[], socket.socket]]:
    address = urlsplit(live.url)
    opened: list[socket.socket] = []

    def connect() -> socket.socket:
        opened.append(socket.create_connection((address.hostname, address.port), timeout=5))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


def received(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """The answer, and that the server closes the connection behind it."""
    data = b""
    while part := connection.recv(65536):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]


def until_said(connection: socket.socket, word: bytes) -> bytes:
    data = b""
    while word not in data:
        part = connection.recv(65536)
        assert part, data
        data += part
    return data


def post_head(path: str, length: int) -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer admin-key\r\ncontent-length: {length}\r\n\r\n".encode()


def test_r14_a_body_that_comes_too_slowly_is_408(connect: Callable[[], socket.socket], live: Any) -> None:
    for path in ("/v1/chat/completions", "/v1/admin/deltas?name=red&sha256=" + "0" * 64):
        connection = connect()
        connection.sendall(post_head(path, 1000) + b"{")
        started = time.monotonic()
        status, error = received(connection)
        assert (status, error["code"], error["type"]) == (408, "body_timeout", "timeout_error")
        assert 0.15 < time.monotonic() - started < 2
    assert list((live.house.store.root / "incoming").iterdir()) == []
    assert live.wait_idle()


def test_an_upload_may_take_longer_than_the_limit_as_long_as_it_goes_on(
    connect: Callable[[], socket.socket], live: Any
) -> None:
    connection = connect()
    connection.sendall(post_head("/v1/admin/deltas?name=red&sha256=" + "0" * 64, 6 * 70_000))
    for _ in range(6):
        time.sleep(0.08)
        connection.sendall(b"x" * 70_000)
    data = until_said(connection, b"digest_mismatch")
    assert data.split()[1] == b"400"


def test_s6_a_head_without_an_end_is_cut(connect: Callable[[], socket.socket]) -> None:
    slow = connect()
    slow.sendall(b"GET /health/live HTTP/1.1\r\nx: ")
    started = time.monotonic()
    for _ in range(4):
        time.sleep(0.05)
        slow.sendall(b"y")
    assert received(slow)[1]["code"] == "head_timeout"
    assert time.monotonic() - started < 2
    silent = connect()
    assert received(silent)[0] == 408
    for end in (b"", b"\r\n\r\n"):
        large = connect()
        large.sendall(b"GET /health/live HTTP/1.1\r\nx: " + b"y" * 5000 + end)
        assert (received(large)[1]["code"]) == "headers_too_large"


def test_a_connection_that_is_kept_alive_is_guarded_anew(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    for _ in range(3):
        connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 3000 + b"\r\n\r\n")
        assert b" 200 " in until_said(connection, b"alive")
    time.sleep(0.4)  # idle, which is allowed
    connection.sendall(b"GET /health/live HTTP/1.1\r\nx: y")
    assert received(connection)[1]["code"] == "head_timeout"


def test_a_request_that_is_refused_early_is_answered_whatever_it_still_sends(
    connect: Callable[[], socket.socket],
) -> None:
    connection = connect()
    connection.sendall(post_head("/v1/chat/completions", 100_000) + b"x" * 100_000)
    assert b" 413 " in until_said(connection, b"body_too_large")
    connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
    assert b" 200 " in until_said(connection, b"alive")


@pytest.mark.parametrize("cut", range(4))
def test_a_head_that_ends_in_time_may_have_much_behind_it(connect: Callable[[], socket.socket], cut: int) -> None:
    """However its last four bytes are cut."""
    head, body = post_head("/v1/completions", 10_000), b" " * 10_000
    connection = connect()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(head[: len(head) - cut])
    time.sleep(0.02)
    connection.sendall(head[len(head) - cut :] + body)
    assert b"invalid_json" in until_said(connection, b"invalid_json")


def test_r13_liveness_answers_while_every_place_is_taken(live: Any) -> None:
    """Sixteen streams of fifty tokens a second that end when their clients leave, and requests that are refused beside them.

    Timed by the process's own clock, on which others on the machine do not count: server and client are in it.
    """
    engine = live.house.engine
    engine.max_model_len, engine.words, engine.step_s = 100_000, (" word",) * 90_000, 0.02
    body = json.dumps(CHAT | {"stream": True, "max_tokens": 90_000}).encode()
    head = post_head("/v1/chat/completions", len(body))
    address = urlsplit(live.url)
    streams = [socket.create_connection((address.hostname, address.port), timeout=5) for _ in range(24)]
    for stream in streams:
        stream.sendall(head + body)
    live.wait_running(16)
    took = []
    with httpx.Client(base_url=live.url, headers=API) as client:
        for _ in range(20):
            started = time.process_time()
            assert client.get("/health/live").status_code == 200
            took.append(time.process_time() - started)
            refused = client.post("/v1/chat/completions", json=CHAT)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_overloaded")
    for stream in streams:
        stream.close()
    assert sorted(took)[-2] < 0.1
    assert live.wait_idle()
