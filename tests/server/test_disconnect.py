"""Clients that go away: over real sockets, because only those can break."""

import asyncio
import hashlib
import http.client
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

BODY = {"model": "tiny-base", "messages": [{"role": "user", "content": "hi"}]}
API, ADMIN = {"authorization": "Bearer user-key"}, {"authorization": "Bearer admin-key"}


def raw_request(url: str, head: str, body: bytes) -> socket.socket:
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), timeout=5)
    connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
    return connection


def post_chat(url: str, **fields: Any) -> socket.socket:
    body = json.dumps({**BODY, **fields}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\nhost: x\nauthorization: Bearer user-key\ncontent-length: {len(body)}\n"
    return raw_request(url, head, body)


def counted(live: Any, code: str) -> float:
    labels = {"route": "/v1/chat/completions", "code": code}
    samples = live.house.context.telemetry.requests.collect()[0].samples
    return sum(s.value for s in samples if s.name.endswith("_total") and labels.items() <= s.labels.items())


@pytest.mark.parametrize("block_at", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_r9_disconnect_frees_row_lease_and_permit(live: Any, block_at: int, stream: bool) -> None:
    live.house.engine.block_at = block_at
    connection = post_chat(live.url, stream=stream)
    live.wait_running()
    if stream and block_at:
        assert b"base" in _read_until(connection, b"one")
    assert not live.house.idle()
    if stream:  # prompt tokens count as queued until the first token is out
        assert (live.house.context.admission.queued_tokens > 0) == (block_at == 0)
    connection.close()
    assert live.wait_idle(2)
    deadline = time.monotonic() + 2
    while not counted(live, "499") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert counted(live, "499") == 1


def test_r9_disconnect_while_the_delta_loads_frees_the_lease_and_lets_the_load_finish(live: Any) -> None:
    upload(live, "slow", b"slow to load")
    live.house.engine.hold_loads = True
    connection = post_chat(live.url, model="slow")
    _wait(lambda: live.house.engine.loads)
    assert not live.house.idle()
    connection.close()
    assert live.wait_idle(2)
    assert not live.house.engine.calls
    live.house.engine.hold_loads = False
    _wait(lambda: [resident.nbytes for resident in live.house.context.pool.residents()] == [1000])


def test_r4_delete_is_refused_while_a_stream_runs_and_waits_with_drain(live: Any) -> None:
    upload(live, "red", b"red")
    live.house.engine.block_at = 2
    connection = post_chat(live.url, model="red", stream=True)
    live.wait_running()
    with httpx.Client(base_url=live.url, headers=ADMIN) as admin:
        for refused in (admin.delete("/v1/admin/deltas/red"), admin.post("/v1/admin/deltas/red/unload")):
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "delta_in_use")
            assert refused.headers["x-should-retry"] == "false"
        assert admin.get("/v1/admin/deltas/red").json()["versions"][0]["in_flight"] == 1
        drained: list[int] = []
        waiter = threading.Thread(
            target=lambda: drained.append(
                httpx.delete(f"{live.url}/v1/admin/deltas/red?drain=true", headers=ADMIN).status_code
            )
        )
        waiter.start()
        deadline = time.monotonic() + 5
        while admin.get("/v1/admin/deltas/red").status_code != 404:
            assert time.monotonic() < deadline
        assert (
            httpx.post(f"{live.url}/v1/completions", json={"model": "red", "prompt": "a"}, headers=API).status_code
            == 404
        )
        assert drained == []
        connection.close()
        waiter.join(timeout=5)
        assert drained == [204]
    assert live.house.engine.unloads == live.house.engine.loads
    assert live.house.store.objects() == []


@pytest.mark.parametrize("form", ["raw", "multipart"])
def test_r14_upload_cut_off_half_way_leaves_nothing(live: Any, form: str) -> None:
    head = "POST /v1/admin/deltas?name=red&sha256=" + "0" * 64 + " HTTP/1.1\nhost: x\n"
    body = b""
    if form == "multipart":
        head = "POST /v1/admin/deltas HTTP/1.1\nhost: x\ncontent-type: multipart/form-data; boundary=B\n"
        body = b'--B\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    head += "authorization: Bearer admin-key\ncontent-length: 2500000\n"
    connection = raw_request(live.url, head, body + b"x" * 1_500_000)
    incoming = live.house.store.root / "incoming"
    _wait(lambda: any(path.stat().st_size for path in incoming.iterdir()))
    connection.close()
    _wait(lambda: not list(incoming.iterdir()))
    assert live.house.store.objects() == []
    with httpx.Client(base_url=live.url, headers=ADMIN) as admin:
        assert admin.get("/v1/admin/deltas").json()["data"] == []


def test_upload_is_streamed_to_disk_while_it_arrives(live: Any, tmp_path: Path) -> None:
    """Half of the file is on the disk before the second half was sent."""
    address = urlsplit(live.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=5)
    connection.putrequest("POST", "/v1/admin/deltas?name=red&sha256=" + "0" * 64)
    connection.putheader("authorization", "Bearer admin-key")
    connection.putheader("content-length", "2500000")
    connection.endheaders()
    connection.send(b"x" * 1_500_000)
    incoming = live.house.store.root / "incoming"
    _wait(lambda: any(path.stat().st_size >= 1 << 20 for path in incoming.iterdir()))
    connection.send(b"x" * 1_000_000)
    response = connection.getresponse()
    assert response.status == 400
    assert json.loads(response.read())["error"]["code"] == "digest_mismatch"
    connection.close()
    assert list(incoming.iterdir()) == []


def upload(live: Any, name: str, content: bytes) -> None:
    query = {"name": name, "sha256": hashlib.sha256(content).hexdigest()}
    response = httpx.post(f"{live.url}/v1/admin/deltas", params=query, content=content, headers=ADMIN)
    assert response.status_code == 201


def _wait(condition: Any) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _read_until(connection: socket.socket, word: bytes) -> bytes:
    received = b""
    while word not in received:
        received += connection.recv(4096)
    return received


@pytest.mark.anyio
async def test_r9_a_handler_cancelled_at_any_moment_frees_its_rows(client: httpx.AsyncClient, house: Any) -> None:
    house.engine.block_at = 1
    for turns in range(40):  # of the loop, from the first row's start on
        asked = asyncio.create_task(client.post("/v1/completions", json={"model": "tiny-base", "prompt": ["a", "b"]}))
        while not house.engine.running:
            await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        assert house.idle(), turns
