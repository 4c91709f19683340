"""The admin plane: take a server out of service for a while, as a rollout does."""

from typing import Any

from starlette.responses import JSONResponse

from server.routes.context import Context, Ctx


async def drain(context: Ctx) -> JSONResponse:
    """New requests are refused and readiness turns red; running ones go on. Poll `rows_in_flight`."""
    context.gateway.supervisor.drain(stopping=False)
    return JSONResponse(_state(context), 202)


async def resume(context: Ctx) -> dict[str, Any]:
    """Raises Draining where the server is stopping."""
    context.gateway.supervisor.resume()
    return _state(context)


def _state(context: Context) -> dict[str, Any]:
    return {"state": context.gateway.state, "rows_in_flight": context.admission.rows}
