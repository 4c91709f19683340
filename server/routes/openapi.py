"""GET /openapi.json: the routes of the application that is asked, as OpenAPI 3.1."""

import functools
import inspect
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from fastapi import Request
from fastapi.params import Depends
from starlette.responses import Response

from server.answers import Told
from server.openapi import Operation, Parameter, document
from server.routes.body import JsonBody
from server.routes.failures import OF_JSON, OF_PARAMETERS, mappings_of

Route = tuple[str, str, str, Any]


async def openapi(request: Request) -> Annotated[Response, Told({200: dict[str, Any]})]:
    return Response(rendered(request.app.state.table), media_type="application/json")


@functools.cache  # of a table, not of an application: the document knows no settings
def rendered(table: tuple[Route, ...]) -> bytes:
    return json.dumps(document([_operation(*route) for route in table]), indent=1).encode()


def _operation(access: str, method: str, path: str, handler: Any) -> Operation:
    hints = get_type_hints(handler, include_extras=True)
    told = _told(hints.pop("return"))
    asked_headers = (Parameter(name, "header", False, hint) for name, hint in told.asked.items())
    parameters = (*_parameters(handler, hints, path), *asked_headers)
    body = next((found.model for hint in hints.values() if isinstance(found := _dependency(hint), JsonBody)), None)
    asked = [*((OF_JSON,) if body else ()), *((OF_PARAMETERS,) if _can_be_wrong(parameters) else ())]
    failures = mappings_of(access, path, handler, asked)
    return Operation(access, method, path.replace(":path}", "}"), handler, parameters, body, told, failures)


def _told(hint: Any) -> Told:
    """What the return type says: its own metadata, or the type itself as the body of a 200."""
    found = next((one for one in _metadata(hint) if isinstance(one, Told)), None)
    return found or Told({200: hint})


def _parameters(handler: Any, hints: dict[str, Any], path: str) -> Iterator[Parameter]:
    for name, parameter in inspect.signature(handler).parameters.items():
        hint = hints[name]
        if f"{{{name}" in path:
            yield Parameter(name, "path", True, hint)
        elif not (hint is Request or _dependency(hint)):
            yield Parameter(name, "query", parameter.default is inspect.Parameter.empty, hint)


def _can_be_wrong(parameters: Sequence[Parameter]) -> bool:
    return any(parameter.where != "path" for parameter in parameters)


def _dependency(hint: Any) -> Any:
    return next((one.dependency for one in _metadata(hint) if isinstance(one, Depends)), None)


def _metadata(hint: Any) -> tuple[Any, ...]:
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()
