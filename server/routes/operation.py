"""The admin plane: take a server out of service for a while, as a rollout does."""

from typing import Annotated

from starlette.responses import JSONResponse

from server.answers import ServiceState, Told
from server.routes.context import Context, Ctx


async def drain(context: Ctx) -> Annotated[JSONResponse, Told({202: ServiceState})]:
    """New requests are refused and readiness turns red; running ones go on. Poll `rows_in_flight`."""
    context.gateway.supervisor.drain(stopping=False)
    return JSONResponse(_state(context), 202)


async def resume(context: Ctx) -> ServiceState:
    """Raises Draining where the server is stopping."""
    context.gateway.supervisor.resume()
    return _state(context)


def _state(context: Context) -> ServiceState:
    return {"state": context.gateway.state, "rows_in_flight": context.admission.rows}
