"""The query of the admin plane: an unknown field is an error, as everywhere in what is ours."""

from fastapi import Request

from server.core import InvalidRequest
from server.routes import artifacts
from server.wire import MAX_KEY, unknown_key


async def known_fields(request: Request) -> None:
    """Raises InvalidRequest for a field that the route does not read. An upload, whose fields may be its query, looks itself."""
    route = request.scope["route"]
    if route.endpoint is artifacts.upload:
        return
    known = [field.alias for field in route.dependant.query_params]
    for name in request.query_params:
        if name not in known:
            raise InvalidRequest(f"{name[:MAX_KEY]} in the query: {unknown_key(name, known)}", param=name[:MAX_KEY])
