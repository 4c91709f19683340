"""A gateway over a fake engine: the whole HTTP side without torch, in milliseconds."""

import asyncio
import hashlib
import json
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

from compressors.artifact import TokenizerInfo
from compressors.errors import ArtifactError, BaseMismatchError
from compressors.verify import Report
from server.app import create_app
from server.artifacts.checks import Checks, delta_check, policy_check
from server.artifacts.store import Incoming, Store
from server.artifacts.versions import ProfileVersion, SAEVersion
from server.config import Settings
from server.core import FinishReason, Message, Sampling, TokenEvent, TokenLogprob, Tool, Window
from server.engine.base import EditReport, EngineDelta, EngineEdit, EngineError, EngineLoadError, LayerReport
from server.gateway import Gateway
from server.routes.context import Context
from server.steering import edited_positions
from server.wiring import Base, wire
from steering.errors import ProfileError, SAEMismatchError

API, ADMIN = {"authorization": "Bearer user-key"}, {"authorization": "Bearer admin-key"}


@dataclass(frozen=True)
class Said:
    """What the fake engine says to one request: of every choice the same words, of every word these log-probabilities."""

    words: tuple[str, ...]
    logprob: float = -0.5
    top: tuple[tuple[str, float], ...] = (("x", float("-inf")),)
    block: bool = False
    error: Exception | None = None


class FakeEngine:
    """Says who answers ("base", or the digest's start), then fixed words; stops, fails or blocks where it is told."""

    max_model_len = 64

    def __init__(self) -> None:
        self.dead = False
        self.words = (" one", " two")
        self.texts: dict[int, tuple[str, ...]] = {}  # what a choice says instead, piece by piece
        self.script: Callable[[str], Said | None] = lambda request_id: None  # goes before all of the above
        self.rows: list[str] = []  # ids of requests, in order
        self.generate_error: Exception | None = None
        self.block_at: int | None = None
        self.fail_at: int | None = None
        self.running: set[str] = set()
        self.calls: list[tuple[list[int], Sampling, EngineDelta | None, str | None]] = []
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.hold_loads = False
        self.edits: dict[str, EngineEdit] = {}  # resident ones
        self.edit_loads: list[str] = []
        self.edit_unloads: list[str] = []
        self.edit_error: Exception | None = None
        self.asked: list[EngineEdit | None] = []
        self.score: float | None = 0.5
        self.spoil: Callable[[EditReport], EditReport | None] = lambda report: report
        self._reports: dict[str, EditReport] = {}

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def generate(
        self,
        request_id: str,
        ids: Sequence[int],
        sampling: Sampling,
        delta: EngineDelta | None,
        salt: str | None,
        edit: EngineEdit | None = None,
    ) -> AsyncGenerator[TokenEvent, None]:
        self.calls.append((list(ids), sampling, delta, salt))
        self.rows.append(request_id)
        self.asked.append(edit)
        said = self.script(request_id)
        if edit is not None:
            assert edit.fingerprint in self.edits
            self._reports[request_id] = self._report(edit, len(ids))
        if error := (said.error if said else self.generate_error):
            raise error
        usual = (delta.digest[:6] if delta else "base", *self.words)
        choices = [self.texts.get(index, usual)[: sampling.max_tokens] for index in range(sampling.n)]
        if said is not None:
            choices = [said.words[: sampling.max_tokens]] * sampling.n
        said = said or Said(())
        self.running.add(request_id)
        try:
            for step in range(max(map(len, choices))):
                if step == self.fail_at:
                    raise EngineError("the fake engine fails here")
                if step == self.block_at or said.block:
                    await asyncio.Event().wait()
                reason = FinishReason.LENGTH if step + 1 == sampling.max_tokens else FinishReason.STOP
                for index, words in enumerate(choices):
                    if step >= len(words):
                        continue
                    word = words[step]
                    top = tuple(TokenLogprob(9, text, logprob) for text, logprob in said.top)
                    logprobs = (TokenLogprob(step, word, said.logprob, top),)
                    finish = reason if step + 1 == len(words) else None
                    yield TokenEvent(index, word, (step,), logprobs, finish, len(ids), 1)
        finally:
            self.running.discard(request_id)

    async def measure(self, delta: EngineDelta) -> int:
        return 1000

    async def load(self, delta: EngineDelta) -> int:
        self.loads.append(delta.digest)
        while self.hold_loads:
            await asyncio.sleep(0.005)
        if not delta.parts and b"unloadable" in Path(delta.path).read_bytes():
            raise EngineLoadError("the fake engine cannot load this")
        return 1000

    async def unload(self, delta: EngineDelta) -> None:
        self.unloads.append(delta.digest)

    async def load_edit(self, edit: EngineEdit) -> None:
        self.edit_loads.append(edit.fingerprint)
        if self.edit_error:
            raise self.edit_error
        self.edits[edit.fingerprint] = edit

    async def unload_edit(self, edit: EngineEdit) -> None:
        self.edit_unloads.append(edit.fingerprint)
        del self.edits[edit.fingerprint]

    async def edit_report(self, request_id: str) -> EditReport | None:
        report = self._reports.pop(request_id, None)
        return self.spoil(report) if report else None

    def _report(self, edit: EngineEdit, length: int) -> EditReport:
        """A worker's report in which the edit did what its spec says, two latents a row; every step is generated."""
        spec = json.loads(edit.spec)
        score = self.score if spec["probe"] else None
        if not spec["tables"] or (spec["condition"] and (score or 0) < spec["condition"]["at_least"]):
            return EditReport((), (), score, False)
        wanted = spec["prompt"]
        if isinstance(wanted, dict):
            wanted = tuple(wanted["positions"]) if "positions" in wanted else Window(*wanted["window"])
        positions = tuple(edited_positions(wanted, length))
        if spec["generation"]:
            positions += (length, length + 1)
        layers = {table["layer"] for table in spec["tables"] if "sae" in table} or {12, 13}
        rows = len(positions)
        done = tuple(LayerReport(layer, rows, 2 * rows, rows, 0.25) for layer in sorted(layers))
        return EditReport(positions, done, score, True)


class ByteTokenizer:
    vocab_size = 256

    def __init__(self, chat_template: str = "{{ messages }}") -> None:
        self.chat_template = chat_template

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())

    def apply_chat_template(self, messages: Sequence[Message]) -> str:
        return "".join(f"{message.role[0]}:{message.content}\n" for message in messages)

    @property
    def own_tool_template(self) -> str:
        return self.chat_template

    def apply_tool_template(self, template: str, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        """A line of what is shown, then the chat."""
        shown = "".join(f"{tool.name};" for tool in tools)
        called = "".join(f"{call.name}={call.arguments};" for message in messages for call in message.calls)
        return f"{shown}|{called}|{self.apply_chat_template(messages)}"


def fake_verify(path: Path) -> Report:
    content = path.read_bytes()
    if content.startswith(b"broken"):
        raise ArtifactError("the header is cut off; upload the file again")
    if content.startswith(b"foreign"):
        raise BaseMismatchError("made for another base")
    manifest = SimpleNamespace(
        method="impart", base_fingerprint="sha256:ba5e", ratio=32.0, bytes_ratio=None, tokenizer=TokenizerInfo()
    )
    return Report(hashlib.sha256(content).hexdigest(), len(content), manifest, ("structure",))


def fake_check(error: type[Exception], facts: dict[str, Any], version: Any) -> Callable[[Incoming], Any]:
    """A check of files that hold JSON: what they say replaces `facts`."""

    def check(incoming: Incoming) -> Any:
        content = incoming.path.read_bytes()
        if content.startswith(b"broken"):
            raise error("the header is cut off; upload the file again")
        said = {"digest": incoming.digest, "nbytes": incoming.nbytes, "created": 1, **facts, **json.loads(content)}
        return version.model_validate_json(json.dumps(said))

    return check


PROFILE = {
    "base_fingerprint": "sha256:ba5e",
    "model_name": "tiny",
    "template_sha256": hashlib.sha256(b"{{ messages }}").hexdigest(),
    "directions": {
        "use_context": {"layers": [12, 13], "strength": 2.0},
        "use_parameter": {"layers": [13, 14], "strength": 1.5},
    },
    "latents": {"12": 10, "13": 20, "14": 30},
    "probe": {"layer": 11, "threshold": 0.6, "auroc": 0.9},
}
SAE = {
    "base_fingerprint": "sha256:ba5e",
    "model_name": "tiny",
    "architecture": "topk",
    "layer": 13,
    "d_in": 8,
    "d_sae": 64,
}
CHECKS = Checks(
    delta_check(fake_verify),
    fake_check(ProfileError, PROFILE, ProfileVersion),
    fake_check(SAEMismatchError, SAE, SAEVersion),
    policy_check("sha256:ba5e"),
)


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
        self.context, keyring = wire(self.settings, self.store, base, self.engine, self.tokenizer, self.checks)
        self.app, self.gateway = create_app(self.context, keyring), self.context.gateway

    def idle(self) -> bool:
        """Nothing runs, no permit and no lease is held."""
        admission, pool, edits = self.context.admission, self.context.pool, self.context.edits
        leased = [resident for resident in pool.residents() if pool.leases(resident.item.digest)]
        leased += [edit for edit in edits.residents() if edits.leases(edit.item.edit.fingerprint)]
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
            "engine": {"max_resident_deltas": 2, "max_resident_edits": 2},
            "admission": {
                "max_concurrent": 16,
                "max_queued_tokens": 100,
                "delta_wait_s": 0.2,
                "edit_wait_s": 0.1,
                "drain_timeout_s": 5,
            },
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
