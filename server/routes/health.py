"""Liveness, readiness and metrics: no key, no waiting for the engine."""

from fastapi import Request
from prometheus_client.exposition import choose_encoder
from starlette.responses import JSONResponse, Response

from server.gateway import State
from server.routes.context import Ctx


async def live(context: Ctx) -> JSONResponse:
    """503 only when the engine is gone for good: a restart is the cure."""
    dead = context.gateway.state is State.ENGINE_DEAD
    return JSONResponse({"status": "engine_dead" if dead else "alive"}, 503 if dead else 200)


async def ready(context: Ctx) -> JSONResponse:
    state = context.gateway.state
    if state is State.READY:
        return JSONResponse({"status": state})
    return JSONResponse({"status": state}, 503, {"retry-after": "5"})


async def metrics(request: Request, context: Ctx) -> Response:
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(context.telemetry.registry), headers={"content-type": content_type})
