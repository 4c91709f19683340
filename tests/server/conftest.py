"""A gateway over a fake engine: the whole HTTP side without torch, in milliseconds."""

import asyncio
import hashlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from compressors.errors import ArtifactError, BaseMismatchError
from compressors.verify import Report
from server.app import create_app
from server.artifacts.lifecycle import Verify
from server.artifacts.store import Store
from server.config import Settings
from server.core import FinishReason, Message, Sampling, TokenEvent, TokenLogprob
from server.engine.base import EngineDelta, EngineError, EngineLoadError
from server.gateway import Gateway
from server.routes.context import Context
from server.wiring import Base, wire

API, ADMIN = {"authorization": "Bearer user-key"}, {"authorization": "Bearer admin-key"}


class FakeEngine:
    """Says who answers ("base", or the digest's start), then fixed words; stops, fails or blocks where it is told."""

    max_model_len = 64

    def __init__(self) -> None:
        self.dead = False
        self.words = (" one", " two")
        self.block_at: int | None = None
        self.fail_at: int | None = None
        self.running: set[str] = set()
        self.calls: list[tuple[list[int], Sampling, EngineDelta | None, str | None]] = []
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.hold_loads = False

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def generate(
        self, request_id: str, ids: Sequence[int], sampling: Sampling, delta: EngineDelta | None, salt: str | None
    ) -> AsyncGenerator[TokenEvent, None]:
        self.calls.append((list(ids), sampling, delta, salt))
        words = (delta.digest[:6] if delta else "base", *self.words)[: sampling.max_tokens]
        self.running.add(request_id)
        try:
            for step, word in enumerate(words):
                if step == self.fail_at:
                    raise EngineError("the fake engine fails here")
                if step == self.block_at:
                    await asyncio.Event().wait()
                reason = FinishReason.LENGTH if step + 1 == sampling.max_tokens else FinishReason.STOP
                for index in range(sampling.n):
                    logprobs = (TokenLogprob(step, word, -0.5, (TokenLogprob(9, "x", float("-inf")),)),)
                    finish = reason if step + 1 == len(words) else None
                    yield TokenEvent(index, word, (step,), logprobs, finish, len(ids), 1)
        finally:
            self.running.discard(request_id)

    async def load(self, delta: EngineDelta) -> int:
        self.loads.append(delta.digest)
        while self.hold_loads:
            await asyncio.sleep(0.005)
        if b"unloadable" in Path(delta.path).read_bytes():
            raise EngineLoadError("the fake engine cannot load this")
        return 1000

    async def unload(self, delta: EngineDelta) -> None:
        self.unloads.append(delta.digest)


class ByteTokenizer:
    vocab_size = 256

    def __init__(self, has_chat_template: bool = True) -> None:
        self.has_chat_template = has_chat_template

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())

    def apply_chat_template(self, messages: Sequence[Message]) -> str:
        return "".join(f"{message.role[0]}:{message.content}\n" for message in messages)


def fake_verify(path: Path) -> Report:
    content = path.read_bytes()
    if content.startswith(b"broken"):
        raise ArtifactError("the header is cut off; upload the file again")
    if content.startswith(b"foreign"):
        raise BaseMismatchError("made for another base")
    manifest = SimpleNamespace(method="impart", base_fingerprint="sha256:ba5e", ratio=32.0)
    return Report(hashlib.sha256(content).hexdigest(), len(content), manifest, ("structure",))


@dataclass
class House:
    """A wired server and what tests look into."""

    engine: FakeEngine
    store: Store
    settings: Settings
    tokenizer: ByteTokenizer
    verify: Verify = fake_verify
    context: Context = field(init=False)
    app: FastAPI = field(init=False)
    gateway: Gateway = field(init=False)

    def __post_init__(self) -> None:
        base = Base("tiny-base", "sha256:ba5e")
        self.context, keyring = wire(self.settings, self.store, base, self.engine, self.tokenizer, self.verify)
        self.app, self.gateway = create_app(self.context, keyring), self.context.gateway

    def idle(self) -> bool:
        """Nothing runs, no permit and no lease is held."""
        admission, pool = self.context.admission, self.context.pool
        leased = [resident for resident in pool.residents() if pool.leases(resident.delta.digest)]
        return not (self.engine.running or admission.rows or admission.queued_tokens or leased)

    def client(self, headers: dict[str, str] = API) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def settings() -> Settings:
    return Settings.model_validate(
        {
            "auth": {"api_keys": "user-key", "admin_keys": "admin-key"},
            "engine": {"max_resident_deltas": 2},
            "admission": {"max_concurrent": 16, "max_queued_tokens": 100, "delta_wait_s": 0.2, "drain_timeout_s": 5},
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
        settings: Settings = settings, tokenizer: ByteTokenizer | None = None, verify: Verify = fake_verify
    ) -> House:
        return House(FakeEngine(), store, settings, tokenizer or ByteTokenizer(), verify)

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
def upload(admin: httpx.AsyncClient) -> Callable[..., Any]:
    """POST a delta of the given bytes; returns the response."""

    async def upload(name: str, content: bytes, **fields: str) -> httpx.Response:
        sha256 = fields.pop("sha256", hashlib.sha256(content).hexdigest())
        form = {"name": name, "sha256": sha256, **fields}
        return await admin.post("/v1/admin/deltas", data=form, files={"file": ("delta.safetensors", content)})

    return upload
