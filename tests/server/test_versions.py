"""Versions on the admin plane: one by one, in pages, checked again, removed; and the other ways to upload them."""

import asyncio
import base64
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from server.artifacts.checks import Checks, delta_check
from tests.server.conftest import ADMIN
from tests.server.fake_checks import CHECKS, fake_verify

pytestmark = pytest.mark.anyio

DELTAS = "/v1/admin/deltas"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def move(admin: httpx.AsyncClient, digest: str, expected: int) -> httpx.Response:
    return await admin.put(f"{DELTAS}/red/alias", json={"digest": digest, "expected_generation": expected})


async def test_r1_a_request_runs_on_the_version_that_its_name_meant_when_it_came(
    admin: httpx.AsyncClient, client: httpx.AsyncClient, upload: Any, house: Any
) -> None:
    """One that answers already, one whose delta loads, one that waits for its turn: the name moves under all three."""
    one, two = (await upload("red", b"1")).json()["digest"], (await upload("red", b"2", activate="false")).json()
    two = next(version["digest"] for version in two["versions"] if version["digest"] != one)
    turns = house.gateway._turns
    house.engine.hold_loads = True

    async def ask(**fields: Any) -> httpx.Response:
        return await client.post("/v1/completions", json={"model": "red", "prompt": "a", **fields})

    loading = asyncio.create_task(ask())
    await until(lambda: house.engine.loads == [one])
    async with turns.turn(None, turns.max_rows - 1, 0):
        waiting = asyncio.create_task(ask(stream=True))
        await until(lambda: turns.waiting == 1)
        assert (await move(admin, two, 1)).status_code == 200
        house.engine.hold_loads = False
        house.engine.hold_at = 2
        await until(lambda: len(house.engine.running) == 1)
    await until(lambda: len(house.engine.running) == 2)
    assert (await move(admin, one, 2)).status_code == 200
    assert (await move(admin, two, 3)).status_code == 200
    house.engine.hold_at = None
    whole, streamed, late = await loading, await waiting, await ask()
    assert whole.json()["gateway"]["delta_digest"] == one
    assert whole.json()["choices"][0]["text"] == f"{one[:6]} one two"
    chunks = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line.startswith("data: {")]
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == f"{one[:6]} one two"
    assert {chunk["gateway"]["delta_digest"] for chunk in chunks if "gateway" in chunk} == {one}
    assert streamed.headers["x-delta-version"] == whole.headers["x-delta-version"] != late.headers["x-delta-version"]
    assert late.json()["choices"][0]["text"].startswith(two[:6])


async def test_one_version_has_its_own_address(admin: httpx.AsyncClient, upload: Any) -> None:
    card = (await upload("red", b"1", description="the first one")).json()
    path = f"{DELTAS}/red/versions/{sha256(b'1')}"
    assert (await admin.get(path)).json() == card["versions"][0]
    assert card["versions"][0]["description"] == "the first one"
    assert code(await admin.get(f"{DELTAS}/red/versions/{'0' * 64}")) == (404, "delta_not_found")
    assert code(await admin.get(f"{DELTAS}/blue/versions/{sha256(b'1')}")) == (404, "delta_not_found")


async def test_a_version_goes_when_nothing_points_to_it_or_uses_it(
    admin: httpx.AsyncClient, client: httpx.AsyncClient, upload: Any, house: Any
) -> None:
    one, two = (await upload("red", b"1")).json()["digest"], sha256(b"2")
    house.engine.block_at = 1
    running = asyncio.create_task(client.post("/v1/completions", json={"model": "red", "prompt": "a"}))
    while not house.engine.running:
        await asyncio.sleep(0.001)
    assert code(await admin.delete(f"{DELTAS}/red/versions/{one}")) == (409, "delta_in_use")  # the name points to it
    await upload("red", b"2")
    assert code(await admin.delete(f"{DELTAS}/red/versions/{one}")) == (409, "delta_in_use")  # a request runs on it
    draining = asyncio.create_task(admin.delete(f"{DELTAS}/red/versions/{one}?drain=true"))
    await asyncio.sleep(0.02)
    assert not draining.done()
    running.cancel()
    assert (await draining).status_code == 204
    assert house.store.objects() == [two]
    assert house.engine.unloads == [one]
    card = (await admin.get(f"{DELTAS}/red")).json()
    assert ([version["digest"] for version in card["versions"]], card["generation"]) == ([two], 2)
    assert code(await admin.delete(f"{DELTAS}/red/versions/{one}")) == (404, "delta_not_found")


async def test_removing_the_only_version_of_an_inactive_name_removes_the_name(
    admin: httpx.AsyncClient, upload: Any, house: Any
) -> None:
    await upload("red", b"1", activate="false")
    assert (await admin.delete(f"{DELTAS}/red/versions/{sha256(b'1')}")).status_code == 204
    assert code(await admin.get(f"{DELTAS}/red")) == (404, "delta_not_found")
    assert [path for path in house.store.root.rglob("*") if path.is_file()] == [house.store.root / "lock"]


async def test_the_list_comes_in_pages_and_by_state(admin: httpx.AsyncClient, upload: Any) -> None:
    for name in ("d", "b", "a", "c"):
        await upload(name, name.encode())
    await admin.post(f"{DELTAS}/c/load")

    async def names(**query: Any) -> tuple[list[str], bool]:
        page = (await admin.get(DELTAS, params=query)).json()
        return [card["name"] for card in page["data"]], page["has_more"]

    assert await names() == (["a", "b", "c", "d"], False)
    assert await names(limit=3) == (["a", "b", "c"], True)
    assert await names(limit=3, after="c") == (["d"], False)
    assert await names(limit=1, after="bb") == (["c"], True)
    assert await names(state="resident") == (["c"], False)
    assert await names(state="stored", limit=2) == (["a", "b"], True)
    for query in ({"limit": 0}, {"limit": 1001}, {"limit": "x"}, {"state": "asleep"}):
        assert code(await admin.get(DELTAS, params=query)) == (400, "invalid_value")


async def test_verification_finds_bytes_that_have_changed(
    admin: httpx.AsyncClient, client: httpx.AsyncClient, upload: Any, house: Any
) -> None:
    await upload("red", b"1")
    await upload("red", b"2")
    report = (await admin.post(f"{DELTAS}/red/verify")).json()
    assert (report["ok"], [check["ok"] for check in report["checks"]]) == (True, [True, True])
    assert code(await admin.post(f"{DELTAS}/blue/verify")) == (404, "delta_not_found")

    house.store.object_path(sha256(b"2")).write_bytes(b"3")
    report = (await admin.post(f"{DELTAS}/red/verify")).json()
    assert (report["ok"], [check["ok"] for check in report["checks"]]) == (False, [True, False])
    assert "digest" in report["checks"][1]["problem"]
    assert str(house.store.root) not in str(report)
    card = (await admin.get(f"{DELTAS}/red")).json()
    assert [version["state"] for version in card["versions"]] == ["stored", "failed"]
    assert [card["name"] for card in (await admin.get(DELTAS, params={"state": "failed"})).json()["data"]] == ["red"]
    ask = {"model": "red", "prompt": "a"}
    assert code(await client.post("/v1/completions", json=ask)) == (500, "delta_load_failed")
    assert code(await admin.post(f"{DELTAS}/red/load")) == (500, "delta_load_failed")
    assert house.engine.loads == []

    assert (await upload("red", b"2")).status_code == 200  # the same bytes again mend it
    assert house.store.object_path(sha256(b"2")).read_bytes() == b"2"
    assert (await client.post("/v1/completions", json=ask)).status_code == 200
    assert (await admin.post(f"{DELTAS}/red/verify")).json()["ok"]
    house.store.object_path(sha256(b"1")).unlink()
    assert "missing" in (await admin.post(f"{DELTAS}/red/verify")).json()["checks"][0]["problem"]


def content_digest(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


async def test_a_raw_upload_may_say_its_digest_in_a_header(admin: httpx.AsyncClient) -> None:
    headers = {"content-digest": f"sha-512=:AAAA:, sha-256=:{content_digest(b'1')}:"}
    response = await admin.post(DELTAS, params={"name": "red"}, content=b"1", headers=headers)
    assert (response.status_code, response.json()["digest"]) == (201, sha256(b"1"))
    query = {"name": "red", "sha256": sha256(b"1")}
    assert (await admin.post(DELTAS, params=query, content=b"1", headers=headers)).status_code == 200
    assert code(await admin.post(DELTAS, params=query, content=b"2", headers=headers)) == (400, "digest_mismatch")
    for wrong in (f"sha-256=:{content_digest(b'2')}:", "sha-256=:!!:", "sha-256=:QUI=:", "md5=:QUI=:", "", "x" * 5000):
        response = await admin.post(DELTAS, params=query, content=b"1", headers={"content-digest": wrong})
        assert code(response) == (400, "invalid_value")
        assert len(response.content) < 1000


async def test_a_raw_upload_says_how_long_it_is(admin: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"1"

    query = {"name": "red", "sha256": sha256(b"1")}
    assert code(await admin.post(DELTAS, params=query, content=chunks())) == (411, "length_required")
    twice = await admin.post(f"{DELTAS}?name=red&name=blue&sha256={sha256(b'1')}", content=b"1")
    assert code(twice) == (400, "invalid_value")


async def test_r15_an_upload_for_another_base_is_refused(admin: httpx.AsyncClient, upload: Any, house: Any) -> None:
    refused = await upload("red", b"1", base_fingerprint="sha256:other")
    assert (code(refused), refused.json()["error"]["param"]) == ((400, "delta_base_mismatch"), "base_fingerprint")
    assert house.store.objects() == []
    assert (await upload("red", b"1", base_fingerprint="sha256:ba5e")).status_code == 201


async def test_r14_a_second_upload_of_a_name_waits_for_nobody(build: Any) -> None:
    """One verification at a time per name: the second one is told to come back, another name is not."""
    started, go = threading.Event(), threading.Event()

    def slow(path: Any) -> Any:
        if path.read_bytes() == b"slow":
            started.set()
            go.wait(5)
        return fake_verify(path)

    house = build(checks=Checks(delta_check(slow), CHECKS.profile, CHECKS.sae, CHECKS.policy))
    await house.gateway.start()
    async with house.client(ADMIN) as admin:

        async def put(name: str, content: bytes) -> httpx.Response:
            query = {"name": name, "sha256": sha256(content)}
            return await admin.post(DELTAS, params=query, content=content)

        first = asyncio.create_task(put("red", b"slow"))
        while not started.is_set():
            await asyncio.sleep(0.001)
        busy = await put("red", b"fast")
        assert (code(busy), busy.headers["retry-after"]) == ((429, "delta_busy"), "1")
        other = asyncio.create_task(put("blue", b"fast"))
        go.set()
        assert ((await first).status_code, (await other).status_code) == (201, 201)
        assert (await put("red", b"fast")).status_code == 201
    await house.gateway.stop()


async def test_r15_a_store_of_another_base_is_not_served(
    admin: httpx.AsyncClient, upload: Any, build: Any, house: Any
) -> None:
    await upload("red", b"1")
    await admin.post(f"{DELTAS}/red/pin")
    other = build(fingerprint="sha256:other")
    await other.gateway.start()
    async with other.client(ADMIN) as client:
        for path, body in (("/v1/completions", {"model": "red", "prompt": "a"}), (f"{DELTAS}/red/load", None)):
            assert code(await client.post(path, json=body)) == (409, "delta_base_mismatch")
        assert (await client.post("/v1/completions", json={"model": "tiny-base", "prompt": "a"})).status_code == 200
    assert other.engine.loads == []
    await other.gateway.stop()
