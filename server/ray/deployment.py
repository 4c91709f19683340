"""The Ray Serve application: one deployment whose replicas are whole gateways, each with its own engine, on one store.

    serve run server.ray.deployment:app model=/models/base config=gateway.toml replicas=2

A replica is running when its engine is, and is replaced when its engine was given up (`/health/live`); an engine that only died
is restarted by the replica's own supervisor. Requests are refused with 503 meanwhile.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from pydantic import Field
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from compressors.base import resolve_base
from server.access import App, Message, Receive, Send
from server.app import create_app
from server.config import AuthSettings, Section, ServerSettings, Settings, SettingsError, load_auth, load_settings
from server.key_files import KeyFiles
from server.logs import log_to_stderr
from server.serve import build, http_config, listen, open_store

_ENGINE_STOP_S = 30  # beside the time that running requests have


class Scale(Section):
    """How many replicas, and what Ray sets aside for each."""

    replicas: int = Field(default=1, ge=1)
    cpus: float = Field(default=1, ge=0)
    gpus: float = Field(default=0, ge=0)  # tensor_parallel_size times pipeline_parallel_size, where vLLM is told these
    # Requests that a replica takes before the next one is asked; None: twice what its engine runs at a time.
    max_ongoing: int | None = Field(default=None, ge=1)
    # Every replica listens here too, the n-th of a machine n ports further: for Prometheus, and to load a delta into one.
    replica_port: int | None = Field(default=None, ge=1, le=65535)


class Arguments(Scale):
    """Of `serve run`, or `args` in a Serve config file."""

    model: str = "default"
    config: Path | None = None


def app(arguments: Arguments) -> Application:
    """Raises SettingsError, DeltaError."""
    settings = load_settings(arguments.config, os.environ, {})
    return application(arguments.model, settings, arguments, partial(load_auth, arguments.config, {}))


def application(model: str, settings: Settings, scale: Scale, read_auth: Callable[[], AuthSettings]) -> Application:
    """Model, store and key files are at the same place on every machine. Raises SettingsError, DeltaError."""
    if settings.server.admin_port is not None:
        raise SettingsError("setting 'server.admin_port': Ray Serve has one port; leave it out")
    base = settings.server.served_name or resolve_base(model).resolve().name
    router = RequestRouterConfig(
        request_router_class="server.ray.router.DeltaRouter", request_router_kwargs={"base": base}
    )
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="gateway",
        num_replicas=scale.replicas,
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        max_ongoing_requests=scale.max_ongoing or 2 * settings.engine.max_num_seqs,
        max_queued_requests=settings.admission.max_concurrent,
        request_router_config=router,
        health_check_period_s=2,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.server.shutdown_timeout_s + _ENGINE_STOP_S,
        logging_config=LoggingConfig(enable_access_log=False),  # a replica has its own
    )
    return deployment.bind(model, settings, scale.replica_port, read_auth)


class Replica:
    """One gateway. Ray Serve builds it, awaits its application, asks `check_health`, calls `__del__` when no request is left."""

    def __init__(self, model: str, settings: Settings, port: int | None, read_auth: Callable[[], AuthSettings]) -> None:
        log_to_stderr(settings.telemetry.log_format)
        self._settings = settings
        self._port = port
        self._store = open_store(settings.store)
        context, keys = build(resolve_base(model), settings, self._store)
        self._gateway = context.gateway
        self._key_files = KeyFiles(keys, settings.auth, read_auth, context.telemetry.key_reloads)
        self._app = create_app(context, keys)
        self._beside: _Listener | None = None

    async def __serve_build_asgi_app__(self) -> App:
        """Ray Serve sends requests after that. Raises PortError, EngineError; Ray Serve tries again then."""
        self._key_files.start()
        where = serve.get_replica_context()
        named = _named(self._app, where.replica_tag)
        if self._port is not None:
            self._beside = _Listener(named, self._settings.server, self._port + where.rank.local_rank)
        await self._gateway.start()
        return named

    async def check_health(self) -> None:
        """Raises EngineDeadError where the engine is gone for good; Ray Serve starts another replica then."""
        if self._gateway.supervisor.given_up:
            raise self._gateway.supervisor.dead_error()

    async def __del__(self) -> None:
        self._gateway.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.server.shutdown_timeout_s):
                while not self._gateway.idle:
                    await asyncio.sleep(0.1)
        if self._beside is not None:
            await self._beside.close()
        await self._key_files.stop()
        await self._gateway.stop()
        self._store.close()


def _named(app: App, name: str) -> App:
    """Every answer says which replica gave it."""

    async def named(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-replica-id", name.encode())]
            await send(message)

        await app(scope, receive, send_named)

    return named


class _Listener:
    """The application of one replica on a port of its own."""

    def __init__(self, app: App, settings: ServerSettings, port: int) -> None:
        """Raises PortError."""
        self._server = uvicorn.Server(http_config(app, settings))
        socket = listen(settings.host, port, "--replica-port")
        self._serving = asyncio.create_task(self._server.serve(sockets=[socket]))

    async def close(self) -> None:
        self._server.should_exit = True
        await self._serving
