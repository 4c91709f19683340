"""`deltaworks serve`: from settings to a listening server, and back down.

Order of the start, cheap checks first: port, store, model folder, tokenizer; then HTTP is up (live, not ready) while the
engine loads.
"""

import asyncio
import contextlib
import errno
import json
import math
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from compressors.base import resolve_base
from compressors.errors import DeltaError
from compressors.fingerprint import fingerprint, stored_tensors
from compressors.verify import Report, verify
from server.access import App
from server.app import SplitApp, create_app
from server.artifacts.backing import StoreError, StoreUnavailable
from server.artifacts.checks import (
    Checks,
    Shape,
    Verify,
    delta_check,
    lora_conversion,
    policy_check,
    profile_check,
    sae_check,
    token_ids,
)
from server.artifacts.store import Store, backing
from server.config import AuthSettings, ServerSettings, Settings, StoreSettings
from server.engine.base import EngineDelta, EngineError
from server.gateway import Gateway
from server.guard import guarded
from server.key_files import KeyFiles
from server.keys import Keys
from server.logs import LogFormat, log_to_stderr
from server.own_tokenizers import OwnTokenizers, loader
from server.prompt import HuggingFaceTokenizer, TokenizerError
from server.routes.context import Context
from server.tool_template import ToolTemplateError
from server.tracing import TracingError
from server.wiring import Base, wire


class PortError(Exception):
    """The address cannot be listened on."""


def serve(model: str, settings: Settings, read_auth: Callable[[], AuthSettings]) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status; errors of the start are printed, one line each.

    `read_auth` reads the settings' section `auth` and its files again. Raises SettingsError.
    """
    try:
        with _listening(settings.server) as listeners, contextlib.closing(open_store(settings.store)) as store:
            context, keys = build(resolve_base(model), settings, store)
            app = _app(context, keys, listeners)
            key_files = KeyFiles(keys, settings.auth, read_auth, context.telemetry.key_reloads)
            log_format = settings.telemetry.log_format
            return asyncio.run(_run(app, context.gateway, listeners, settings.server, key_files, log_format))
    except (
        PortError,
        StoreError,
        StoreUnavailable,
        DeltaError,
        TokenizerError,
        ToolTemplateError,
        TracingError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def open_store(settings: StoreSettings) -> Store:
    """Raises StoreError, StoreUnavailable."""
    place = backing(settings.path, settings.cache_path, settings.endpoint_url, settings.max_cache_bytes)
    store = Store(place, settings.max_bytes)
    store.open()
    return store


@contextlib.contextmanager
def _listening(settings: ServerSettings) -> Iterator[tuple[socket.socket, ...]]:
    """The API's socket and, where it has a port, the admin plane's; taken before anything slow starts. Raises PortError."""
    with contextlib.ExitStack() as taken:
        listeners = [taken.enter_context(listen(settings.host, settings.port, "--port"))]
        if settings.admin_port is not None:
            listeners.append(taken.enter_context(listen(settings.host, settings.admin_port, "--admin-port")))
        yield tuple(listeners)


def listen(host: str, port: int, flag: str) -> socket.socket:
    """Raises PortError."""
    try:
        listener = socket.create_server((host, port), backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortError(f"port {port} on {host} is in use; choose another with {flag}") from error
        raise PortError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    # Connections inherit it; asyncio sets it on none that comes from a socket made here. Without it a stream's first token waits
    # until the client has acknowledged the head, 40 ms on a connection that was used before.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def verifier(folder: Path) -> tuple[str, Verify]:
    """The fingerprint of a base folder, and the check of uploads against that base. Raises DeltaError."""
    shapes = {name: tensor.shape for name, tensor in stored_tensors(folder).items()}
    base_fingerprint = fingerprint(folder)

    def verify_for_base(path: Path) -> Report:
        report = verify(path, base_fingerprint, shapes, folder)
        if report.manifest.tokenizer.files:
            loader(folder)(path)  # what is refused now fails no request later
        return report

    return base_fingerprint, verify_for_base


def checks_for(folder: Path, reserved_tokens: int = 0) -> tuple[str, Checks]:
    """The fingerprint of a base folder, and the checks of all uploads against that base. Raises DeltaError."""
    base_fingerprint, verify_for_base = verifier(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    # A model of another build than ours may name neither; nothing fits it then.
    shape = Shape(base_fingerprint, int(text.get("hidden_size", 0)), int(text.get("num_hidden_layers", 0)))
    return base_fingerprint, Checks(
        delta_check(verify_for_base, token_ids(text.get("eos_token_id")), reserved_tokens),
        profile_check(shape),
        sae_check(shape),
        policy_check(base_fingerprint),
        lora_conversion(folder),
    )


def build(folder: Path, settings: Settings, store: Store) -> tuple[Context, Keys]:
    """The application's collaborators around vLLM, which is not started yet. `store` is open.

    Raises DeltaError, StoreError, TokenizerError, ToolTemplateError, TracingError.
    """
    from server.engine.vllm import VLLMEngine

    tokenizer, load = HuggingFaceTokenizer(folder), loader(folder)
    own = OwnTokenizers(load, settings.engine.max_resident_deltas)
    base_fingerprint, checks = checks_for(folder, settings.engine.reserved_tokens)
    base = Base(settings.server.served_name or folder.resolve().name, base_fingerprint)

    def own_tokenizer(delta: EngineDelta) -> Any:
        found = own.of(delta)
        return found.loaded if found is not None else None

    engine = VLLMEngine(folder, settings.engine, own_tokenizer)
    return wire(settings, store, base, engine, tokenizer, checks, own)


def _app(context: Context, keys: Keys, listeners: Sequence[socket.socket]) -> App:
    if len(listeners) == 1:
        return create_app(context, keys)
    return SplitApp(context, keys, listeners[1].getsockname()[1])


def http_config(app: App, settings: ServerSettings) -> uvicorn.Config:
    """uvicorn with our own logs, and with limits of a request's head."""
    config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False, lifespan="off")
    config.load()
    protocol = guarded(config.http_protocol_class, settings.max_header_bytes, settings.header_timeout_s)
    config.http_protocol_class = protocol  # type: ignore[assignment]  # uvicorn calls it, and asks for no class
    return config


class _Server(uvicorn.Server):
    """Turns not-ready with the first signal and answers on (503 to new requests) until the running ones are done, or time is up."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, drain_s: float) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._drain_s = drain_s
        self._stop_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._stop_at is None:
            self._stop_at = time.monotonic() + self._drain_s
            self._gateway.drain()
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Asked ten times a second whether to stop."""
        if self._stop_at is not None:
            left_s = self._stop_at - time.monotonic()
            if self._gateway.idle or left_s <= 0:
                self.config.timeout_graceful_shutdown = max(1, math.ceil(left_s))  # for answers that are being sent
                return True
        return await super().on_tick(counter)


async def _run(
    app: App,
    gateway: Gateway,
    listeners: Sequence[socket.socket],
    settings: ServerSettings,
    key_files: KeyFiles,
    log_format: LogFormat = "json",
) -> int:
    log_to_stderr(log_format)
    key_files.start()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, key_files.reload)
    server = _Server(http_config(app, settings), gateway, settings.shutdown_timeout_s)
    (host, port), *admin = [listener.getsockname()[:2] for listener in listeners]
    print(f"listening on http://{host}:{port}, the model is loading", flush=True)
    for admin_host, admin_port in admin:
        print(f"admin plane on http://{admin_host}:{admin_port}", flush=True)
    # uvicorn raises a caught signal again when it has stopped; the engine has to be stopped after that.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    serving = asyncio.create_task(server.serve(sockets=list(listeners)))
    starting = asyncio.create_task(gateway.start())
    status = 0
    try:
        await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done() and starting.exception() is None:
            print(f"ready: http://{host}:{port}/v1", flush=True)
            await serving
        try:
            await starting  # a half-built engine can only be stopped once it is built
        except EngineError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
    finally:
        server.should_exit = True
        await serving
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
        await gateway.stop()
        await key_files.stop()
    return status
