"""A gateway over a fake engine: the whole HTTP side without torch, in milliseconds."""

import asyncio
import hashlib
import subprocess
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from server.app import create_app
from server.artifacts.checks import Checks
from server.artifacts.store import Store
from server.child import Child
from server.config import Settings
from server.gateway import Gateway
from server.routes.context import Context
from server.wiring import Base, wire
from tests.server import contract
from tests.server.byte_tokenizer import ByteTokenizer
from tests.server.fake_checks import CHECKS
from tests.server.fake_engine import FakeEngine

API, ADMIN = {"authorization": "Bearer user-key"}, {"authorization": "Bearer admin-key"}


@dataclass
class House:
    """A wired server and what tests look into."""

    engine: FakeEngine
    store: Store
    settings: Settings
    tokenizer: ByteTokenizer
    checks: Checks = CHECKS
    fingerprint: str = "sha256:ba5e"
    context: Context = field(init=False)
    app: FastAPI = field(init=False)
    gateway: Gateway = field(init=False)

    def __post_init__(self) -> None:
        base = Base("tiny-base", self.fingerprint)
        self.context, keys = wire(self.settings, self.store, base, self.engine, self.tokenizer, self.checks)
        self.app, self.gateway = create_app(self.context, keys), self.context.gateway

    def idle(self) -> bool:
        """Nothing runs, no permit and no lease is held."""
        admission, pool, edits = self.context.admission, self.context.pool, self.context.edits
        leased = [resident for resident in pool.residents() if pool.leases(resident.item.digest)]
        leased += [edit for edit in edits.residents() if edits.leases(edit.item.edit.fingerprint)]
        return not (self.engine.running or admission.rows or admission.queued_tokens or leased)

    def client(self, headers: dict[str, str] = API) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        hooks = {"response": [contract.hold]}
        return httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers, event_hooks=hooks)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def settings() -> Settings:
    return Settings.model_validate(
        {
            "auth": {"api_keys": "user-key", "admin_keys": "admin-key"},
            "engine": {"max_resident_deltas": 2, "max_resident_edits": 2},
            "admission": {
                "max_concurrent": 16,
                "max_queued_tokens": 100,
                "delta_wait_s": 0.2,
                "edit_wait_s": 0.1,
                "drain_timeout_s": 5,
            },
            "gate": {"timeout_ms": 60_000},
            "server": {"max_body_bytes": 20_000, "max_upload_bytes": 3_000_000},
        }
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "store")
    store.open()
    yield store
    store.close()


@pytest.fixture
def build(store: Store, settings: Settings) -> Callable[..., House]:
    """Build a house over the store; still loading until `gateway.start()`."""

    def build(
        settings: Settings = settings,
        tokenizer: ByteTokenizer | None = None,
        checks: Checks = CHECKS,
        fingerprint: str = "sha256:ba5e",
    ) -> House:
        return House(FakeEngine(), store, settings, tokenizer or ByteTokenizer(), checks, fingerprint)

    return build


@pytest.fixture
async def house(build: Callable[..., House]) -> AsyncGenerator[House, None]:
    house = build()
    await house.gateway.start()
    yield house
    await house.gateway.stop()


@pytest.fixture
async def client(house: House) -> AsyncGenerator[httpx.AsyncClient, None]:
    async with house.client() as client:
        yield client


@pytest.fixture
async def admin(house: House) -> AsyncGenerator[httpx.AsyncClient, None]:
    async with house.client(ADMIN) as client:
        yield client


@dataclass
class Live:
    """A house behind a real uvicorn on loopback, in a thread with its own event loop."""

    house: House
    url: str

    def wait_idle(self, seconds: float = 5) -> bool:
        deadline = time.monotonic() + seconds
        while not self.house.idle() and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.house.idle()

    def wait_running(self, rows: int = 1) -> None:
        deadline = time.monotonic() + 5
        while len(self.house.engine.running) < rows:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def live(build: Callable[..., House]) -> Iterator[Live]:
    house = build()
    server = uvicorn.Server(uvicorn.Config(house.app, host="127.0.0.1", port=0, log_config=None, lifespan="off"))

    async def run() -> None:
        await house.gateway.start()
        await server.serve()
        await house.gateway.stop()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.001)
    yield Live(house, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
    server.should_exit = server.force_exit = True
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.fixture
def child(live: Live, tmp_path: Path) -> Child:
    """The live server as the benches hold theirs, though it runs in this process."""
    process: Any = subprocess.Popen(["true"])
    process.wait()
    return Child(live.url, ADMIN, process, tmp_path / "log")


@pytest.fixture
def upload(admin: httpx.AsyncClient) -> Callable[..., Any]:
    """POST a delta, or an artifact of another `kind`, of the given bytes; returns the response."""

    async def upload(name: str, content: bytes, kind: str = "deltas", **fields: str) -> httpx.Response:
        sha256 = fields.pop("sha256", hashlib.sha256(content).hexdigest())
        form = {"name": name, "sha256": sha256, **fields}
        return await admin.post(f"/v1/admin/{kind}", data=form, files={"file": ("delta.safetensors", content)})

    return upload


@pytest.fixture
async def bed(house: House, client: httpx.AsyncClient, upload: Callable[..., Any]) -> Any:
    from tests.server.gate_bed import Bed  # it imports this module

    made = Bed(house, client, upload)
    await made.open()
    return made
