"""Many registered deltas and room for few, through the whole gateway; pins and the disk's budget on the admin plane."""

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx
import pytest

from server.artifacts.store import Store
from server.config import Settings
from server.core import Sampling, TokenEvent
from server.engine.base import EngineDelta, EngineEdit
from tests.server.conftest import ADMIN, ByteTokenizer, House
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

DELTAS = "/v1/admin/deltas"
BYTES = 1000  # of every delta in execution form, as the fake engine has it


class StrictEngine(FakeEngine):
    """Holds every request to what is resident while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.resident: set[str] = set()
        self.serving: Counter[str] = Counter()
        self.most = 0

    async def generate(
        self,
        request_id: str,
        ids: Sequence[int],
        sampling: Sampling,
        delta: EngineDelta | None,
        salt: str | None,
        edit: EngineEdit | None = None,
    ) -> AsyncGenerator[TokenEvent, None]:
        assert delta is not None
        self.serving[delta.digest] += 1
        try:
            async for event in super().generate(request_id, ids, sampling, delta, salt, edit):
                assert delta.digest in self.resident
                await asyncio.sleep(0.002)
                assert delta.digest in self.resident
                yield event
        finally:
            self.serving[delta.digest] -= 1

    async def load(self, delta: EngineDelta) -> int:
        await asyncio.sleep(0.002)
        self.resident.add(delta.digest)
        self.most = max(self.most, len(self.resident))
        return await super().load(delta)

    async def unload(self, delta: EngineDelta) -> None:
        assert not self.serving[delta.digest]
        await super().unload(delta)
        self.resident.discard(delta.digest)


def zipf(count: int, draws: int, seed: int) -> list[int]:
    """Indices below `count`, the i-th in proportion to 1 / (i + 1)."""
    weights = [1 / (rank + 1) for rank in range(count)]
    return random.Random(seed).choices(range(count), weights, k=draws)


@pytest.mark.slow
@pytest.mark.parametrize("packed_bytes", [0, 150])
async def test_300_deltas_with_room_for_16_serve_a_zipf_load(store: Store, packed_bytes: int) -> None:
    values = {
        "auth": {"api_keys": "user-key", "admin_keys": "admin-key"},
        "engine": {
            "max_resident_deltas": 1000,
            "max_resident_delta_bytes": 16 * BYTES,
            "max_packed_delta_bytes": packed_bytes,
        },
    }
    house = House(StrictEngine(), store, Settings.model_validate(values), ByteTokenizer())
    await house.gateway.start()
    contents = [f"{number:03}".encode() for number in range(300)]
    async with house.client(ADMIN) as admin, house.client() as client:
        for content in contents:
            query = {"name": f"d{content.decode()}", "sha256": hashlib.sha256(content).hexdigest()}
            assert (await admin.post(DELTAS, params=query, content=content)).status_code == 201

        turns = iter(zipf(300, 1500, seed=1))

        async def ask() -> None:
            for index in turns:
                response = await client.post("/v1/completions", json={"model": f"d{index:03}", "prompt": "a"})
                assert response.status_code == 200, response.text
                expected = hashlib.sha256(contents[index]).hexdigest()[:6] + " one two"
                assert response.json()["choices"][0]["text"] == expected

        await asyncio.gather(*(ask() for _ in range(48)))
        status = (await admin.get("/v1/admin/status")).json()
        found = (await client.get("/metrics")).text
    engine: Any = house.engine
    assert engine.most == 16
    assert 284 <= len(engine.unloads) < 1500
    assert status["resident_bytes"] == 16 * BYTES
    assert status["packed_bytes"] <= packed_bytes
    from_ram = 'deltaworks_delta_loads_total{outcome="ok",source="ram"}'
    assert (f"{from_ram} 0.0" in found) == (packed_bytes == 0)
    assert house.idle()
    await house.gateway.stop()


async def test_a_budget_below_one_delta_is_told_with_setting_and_size(store: Store) -> None:
    values = {"auth": {"admin_keys": "admin-key"}, "engine": {"max_resident_delta_bytes": BYTES - 1}}
    house = House(FakeEngine(), store, Settings.model_validate(values), ByteTokenizer())
    await house.gateway.start()
    async with house.client(ADMIN) as admin:
        await admin.post(DELTAS, params={"name": "red", "sha256": hashlib.sha256(b"1").hexdigest()}, content=b"1")
        for path, body in ((f"{DELTAS}/red/load", None), ("/v1/completions", {"model": "red", "prompt": "a"})):
            response = await admin.post(path, json=body)
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (507, "delta_too_large")
            assert "engine.max_resident_delta_bytes is 999: it must be at least 1000" in error["message"]
            assert response.headers["x-should-retry"] == "false"
    assert house.idle()
    await house.gateway.stop()


async def test_a_pin_holds_through_moves_and_a_restart(
    admin: httpx.AsyncClient, upload: Any, house: House, build: Any
) -> None:
    engine = house.engine
    one = (await upload("pin", b"1")).json()["digest"]
    card = (await admin.post(f"{DELTAS}/pin/pin")).json()
    assert (card["pinned"], card["versions"][0]["state"]) == (True, "resident")
    for name in ("a", "b"):
        await upload(name, name.encode())
        assert (await admin.post(f"{DELTAS}/{name}/load")).status_code == 200
    assert one not in engine.unloads
    for path, code in (("pin/unload", "delta_pinned"), ("a/pin", "delta_pin_limit")):
        response = await admin.post(f"{DELTAS}/{path}")
        assert (response.status_code, response.json()["error"]["code"]) == (409, code)

    two = (await upload("pin", b"2")).json()["digest"]
    while two not in engine.loads:
        await asyncio.sleep(0.001)
    assert [house.context.pool.pinned(digest) for digest in (one, two)] == [False, True]
    await admin.put(f"{DELTAS}/pin/alias", json={"digest": one, "expected_generation": 2})
    assert [house.context.pool.pinned(digest) for digest in (one, two)] == [True, False]

    reborn = build()
    assert reborn.engine.loads == []
    await reborn.gateway.start()
    while reborn.context.pool.state(one)[0] != "resident":
        await asyncio.sleep(0.001)
    async with reborn.client(ADMIN) as again:
        assert (await again.get(f"{DELTAS}/pin")).json()["pinned"] is True
        assert (await again.post(f"{DELTAS}/pin/unpin")).json()["pinned"] is False
        assert (await again.post(f"{DELTAS}/pin/unload")).status_code == 200
    await reborn.gateway.stop()
    assert '"pinned"' not in (house.store.root / "refs/delta/a.json").read_text()


async def test_deleting_a_pinned_name_ends_the_pin(admin: httpx.AsyncClient, upload: Any, house: House) -> None:
    digest = (await upload("pin", b"1")).json()["digest"]
    await admin.post(f"{DELTAS}/pin/pin")
    assert (await admin.delete(f"{DELTAS}/pin")).status_code == 204
    assert not house.context.pool.pinned(digest)
    assert house.engine.unloads == [digest]


@pytest.mark.parametrize("path", ["pin", "unpin"])
async def test_unknown_and_inactive_names_cannot_be_pinned(admin: httpx.AsyncClient, upload: Any, path: str) -> None:
    await upload("idle", b"1", activate="false")
    assert (await admin.post(f"{DELTAS}/nobody/{path}")).json()["error"]["code"] == "delta_not_found"
    assert (await admin.post(f"{DELTAS}/idle/{path}")).status_code == (404 if path == "pin" else 200)


async def test_the_disk_has_a_budget(tmp_path: Any, settings: Settings) -> None:
    store = Store(tmp_path / "small", max_bytes=100)
    store.open()
    house = House(FakeEngine(), store, settings, ByteTokenizer())
    await house.gateway.start()

    async def put(admin: httpx.AsyncClient, name: str, content: bytes) -> httpx.Response:
        query = {"name": name, "sha256": hashlib.sha256(content).hexdigest()}
        return await admin.post(DELTAS, params=query, content=content)

    async with house.client(ADMIN) as admin:
        assert (await put(admin, "a", b"a" * 60)).status_code == 201
        refused = await put(admin, "b", b"b" * 41)
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "insufficient_storage")
        assert "store.max_bytes is 100" in refused.json()["error"]["message"]
        assert (await put(admin, "same", b"a" * 60)).status_code == 201  # nothing more to store
        assert (await put(admin, "b", b"b" * 40)).status_code == 201
        assert store.nbytes == 100
        for name in ("a", "same"):
            assert (await admin.delete(f"{DELTAS}/{name}")).status_code == 204
    assert store.nbytes == 40
    await house.gateway.stop()
    store.close()
    again = Store(tmp_path / "small")
    again.open()
    assert again.nbytes == 40
    again.close()
