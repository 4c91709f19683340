"""The ASGI application: a literal table of routes over the collaborators that it is given. No globals, no torch."""

import functools
from collections.abc import Callable, MutableMapping
from typing import Any, TypeAlias

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from server import errors
from server.access import AccessMiddleware, Receive, Send
from server.auth import require_admin, require_inference
from server.keys import Keys
from server.routes import adapters, artifacts, generation, health, models, openapi, operation, tokens
from server.routes.context import Context
from server.routes.query import known_fields

PUBLIC, INFERENCE, ADMIN = "public", "inference", "admin"

Route: TypeAlias = tuple[str, str, str, Callable[..., Any]]
Table: TypeAlias = tuple[Route, ...]

ROUTES: Table = (
    (PUBLIC, "GET", "/health", health.live),
    (PUBLIC, "GET", "/health/live", health.live),
    (PUBLIC, "GET", "/health/ready", health.ready),
    (PUBLIC, "GET", "/ping", health.live),
    (PUBLIC, "POST", "/ping", health.live),
    (PUBLIC, "GET", "/version", health.version),
    (PUBLIC, "GET", "/metrics", health.metrics),
    (PUBLIC, "GET", "/metrics/engine", health.engine_metrics),
    (PUBLIC, "GET", "/metrics/compat", health.compat_metrics),
    (PUBLIC, "GET", "/openapi.json", openapi.openapi),
    (INFERENCE, "POST", "/v1/chat/completions", generation.chat),
    (INFERENCE, "POST", "/v1/completions", generation.completions),
    (INFERENCE, "POST", "/tokenize", tokens.tokenize),
    (INFERENCE, "POST", "/v1/tokenize", tokens.tokenize),
    (INFERENCE, "POST", "/detokenize", tokens.detokenize),
    (INFERENCE, "POST", "/v1/detokenize", tokens.detokenize),
    (INFERENCE, "GET", "/tokenizer_info", tokens.tokenizer_info),
    (INFERENCE, "GET", "/v1/models", models.list_models),
    (INFERENCE, "GET", "/v1/models/{model_id:path}", models.get_model),
    (ADMIN, "POST", "/v1/admin/deltas", artifacts.upload),
    (ADMIN, "GET", "/v1/admin/deltas", artifacts.list_all),
    (ADMIN, "GET", "/v1/admin/deltas/{name}", artifacts.get),
    (ADMIN, "DELETE", "/v1/admin/deltas/{name}", artifacts.delete),
    (ADMIN, "PUT", "/v1/admin/deltas/{name}/alias", artifacts.move_alias),
    (ADMIN, "POST", "/v1/admin/deltas/{name}/verify", artifacts.verify),
    (ADMIN, "GET", "/v1/admin/deltas/{name}/versions/{digest}", artifacts.get_version),
    (ADMIN, "DELETE", "/v1/admin/deltas/{name}/versions/{digest}", artifacts.delete_version),
    (ADMIN, "POST", "/v1/admin/profiles", artifacts.upload),
    (ADMIN, "GET", "/v1/admin/profiles", artifacts.list_all),
    (ADMIN, "GET", "/v1/admin/profiles/{name}", artifacts.get),
    (ADMIN, "DELETE", "/v1/admin/profiles/{name}", artifacts.delete),
    (ADMIN, "PUT", "/v1/admin/profiles/{name}/alias", artifacts.move_alias),
    (ADMIN, "POST", "/v1/admin/profiles/{name}/verify", artifacts.verify),
    (ADMIN, "GET", "/v1/admin/profiles/{name}/versions/{digest}", artifacts.get_version),
    (ADMIN, "DELETE", "/v1/admin/profiles/{name}/versions/{digest}", artifacts.delete_version),
    (ADMIN, "POST", "/v1/admin/saes", artifacts.upload),
    (ADMIN, "GET", "/v1/admin/saes", artifacts.list_all),
    (ADMIN, "GET", "/v1/admin/saes/{name}", artifacts.get),
    (ADMIN, "DELETE", "/v1/admin/saes/{name}", artifacts.delete),
    (ADMIN, "PUT", "/v1/admin/saes/{name}/alias", artifacts.move_alias),
    (ADMIN, "POST", "/v1/admin/saes/{name}/verify", artifacts.verify),
    (ADMIN, "GET", "/v1/admin/saes/{name}/versions/{digest}", artifacts.get_version),
    (ADMIN, "DELETE", "/v1/admin/saes/{name}/versions/{digest}", artifacts.delete_version),
    (ADMIN, "POST", "/v1/admin/policies", artifacts.upload),
    (ADMIN, "GET", "/v1/admin/policies", artifacts.list_all),
    (ADMIN, "GET", "/v1/admin/policies/{name}", artifacts.get),
    (ADMIN, "DELETE", "/v1/admin/policies/{name}", artifacts.delete),
    (ADMIN, "PUT", "/v1/admin/policies/{name}/alias", artifacts.move_alias),
    (ADMIN, "POST", "/v1/admin/policies/{name}/verify", artifacts.verify),
    (ADMIN, "GET", "/v1/admin/policies/{name}/versions/{digest}", artifacts.get_version),
    (ADMIN, "DELETE", "/v1/admin/policies/{name}/versions/{digest}", artifacts.delete_version),
    (ADMIN, "POST", "/v1/admin/deltas/{name}/load", artifacts.load),
    (ADMIN, "POST", "/v1/admin/deltas/{name}/unload", artifacts.unload),
    (ADMIN, "POST", "/v1/admin/deltas/{name}/pin", artifacts.pin),
    (ADMIN, "POST", "/v1/admin/deltas/{name}/unpin", artifacts.unpin),
    (ADMIN, "GET", "/v1/admin/status", artifacts.status),
    (ADMIN, "POST", "/v1/load_lora_adapter", adapters.load),
    (ADMIN, "POST", "/v1/unload_lora_adapter", adapters.unload),
    (ADMIN, "POST", "/v1/admin/drain", operation.drain),
    (ADMIN, "POST", "/v1/admin/resume", operation.resume),
)


GUARDS = {PUBLIC: [], INFERENCE: [Depends(require_inference)], ADMIN: [Depends(require_admin), Depends(known_fields)]}


def create_app(context: Context, keys: Keys, table: Table = ROUTES) -> FastAPI:
    app = FastAPI(title="Deltaworks", openapi_url=None, redirect_slashes=False)
    app.state.context = context
    app.state.keys = keys
    app.state.table = table
    app.router.routes.extend(_routes(table))
    for kind in (*errors.TABLE, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, errors.answer)
    operations = {handler.__name__ for access, _, _, handler in ROUTES if access == ADMIN}
    context.telemetry.http.expect(operations, errors.codes())
    app.add_middleware(AccessMiddleware, telemetry=context.telemetry)
    return app


@functools.cache  # the handlers' signatures are read once, not per application: they know no application
def _routes(table: Table) -> tuple[APIRoute, ...]:
    return tuple(
        APIRoute(path, handler, methods=[method], dependencies=GUARDS[access], response_model=None)
        for access, method, path, handler in table
    )


class SplitApp:
    """Two applications over the same collaborators, told apart by the port that a connection came to.

    The admin plane is at `admin_port` and nowhere else; that port has no other routes than it and the public ones.
    """

    def __init__(self, context: Context, keys: Keys, admin_port: int) -> None:
        self.rest = create_app(context, keys, tuple(route for route in ROUTES if not _of_admin_plane(route)))
        of_admins = tuple(route for route in ROUTES if route[0] == PUBLIC or _of_admin_plane(route))
        self.admin = create_app(context, keys, of_admins)
        self._admin_port = admin_port

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        # The socket's own address, never what a header says.
        await (self.admin if scope["server"][1] == self._admin_port else self.rest)(scope, receive, send)


def _of_admin_plane(route: Route) -> bool:
    return route[2].startswith("/v1/admin/")
