"""Liveness, readiness, version and metrics: no key, no waiting for the engine."""

from typing import Annotated

from fastapi import Request
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.responses import JSONResponse, Response

from server.answers import Life, Readiness, Text, Told, VersionAnswer
from server.build import installed
from server.routes.context import Ctx
from server.supervisor import State

Exposition = Annotated[Response, Told({200: Text(("text/plain", "application/openmetrics-text"))})]


async def live(context: Ctx) -> Annotated[JSONResponse, Told({200: Life, 503: Life})]:
    """503 only when the engine is gone for good: it is restarted as long as that may help, then a new process is the cure."""
    dead = context.gateway.supervisor.given_up
    return JSONResponse({"status": "engine_dead" if dead else "alive"}, 503 if dead else 200)


async def ready(context: Ctx) -> Annotated[JSONResponse, Told({200: Readiness, 503: Readiness})]:
    state = context.gateway.state
    if state is State.READY:
        return JSONResponse({"status": state})
    after_s = context.gateway.supervisor.dead_error().retry_after_s if state is State.ENGINE_DEAD else 5
    return JSONResponse({"status": state}, 503, {"retry-after": str(after_s or 60)})


async def version(context: Ctx) -> VersionAnswer:
    build = installed()
    return {
        "version": build.version,
        "git_sha": build.git_sha,
        "base": context.registry.base_id,
        "base_fingerprint": context.gateway.base_fingerprint,
    }


async def metrics(request: Request, context: Ctx) -> Exposition:
    return _exposition(request, context.telemetry.registry)


async def engine_metrics(request: Request, context: Ctx) -> Exposition:
    """vLLM's own, by its own names; empty while it loads."""
    return _exposition(request, context.telemetry.engine_own)


async def compat_metrics(request: Request, context: Ctx) -> Exposition:
    """Our numbers by the names of vLLM's that routers read."""
    return _exposition(request, context.telemetry.compat)


def _exposition(request: Request, registry: CollectorRegistry) -> Response:
    """Prometheus' text, or OpenMetrics where the client asks for it."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), headers={"content-type": content_type})
