"""The API's document as a test: every answer that a client of the tests gets is held against it.

Answers are held to it more strictly than clients should be: they hold no key that the document does not know.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import httpx
import jsonschema_rs

from server.app import ROUTES
from server.routes.openapi import rendered

Json = dict[str, Any]

DOCUMENT: Json = json.loads(rendered(ROUTES))
EVENTS = "text/event-stream"


def _named(found: Any) -> Iterator[str]:
    """The components that a piece of the document refers to, once or more."""
    if isinstance(found, dict):
        if "$ref" in found:
            yield found["$ref"].rsplit("/")[-1]
        for value in found.values():
            yield from _named(value)
    elif isinstance(found, list):
        for value in found:
            yield from _named(value)


@cache
def _components() -> Json:
    """All schemas, those of answers closed."""
    schemas: Json = json.loads(json.dumps(DOCUMENT["components"]["schemas"]))
    told = [answer for path in DOCUMENT["paths"].values() for how in path.values() for answer in [how["responses"]]]
    pending, seen = {*_named(told), *_named(DOCUMENT["components"]["responses"]), *EVENT_TYPES.values()}, set()
    while pending:
        name = pending.pop()
        if name in schemas and name not in seen:
            seen.add(name)
            pending |= set(_named(schemas[name]))
            if "properties" in schemas[name]:
                schemas[name].setdefault("additionalProperties", False)
    return {"schemas": schemas}


EVENT_TYPES = {"/v1/chat/completions": "ChatCompletionChunk", "/v1/completions": "TextCompletionChunk"}


@cache
def _validator(schema: str) -> Any:
    return jsonschema_rs.validator_for({**json.loads(schema), "components": _components()})


def check(schema: Json, value: Any, what: str) -> None:
    problem = next(_validator(json.dumps(schema)).iter_errors(value), None)
    assert problem is None, f"{what} is not as the document says: {problem}"


def check_event(path: str, data: Any) -> None:
    """The data of one event of a stream."""
    name = "ErrorBody" if "error" in data else EVENT_TYPES[path]
    check({"$ref": f"#/components/schemas/{name}"}, data, f"an event of {path}")


@cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    """The path of a model may have slashes in it; others have their parts."""
    several = re.compile(r"\{model_id\}")
    found = [(re.sub(r"\{[^}]*\}", "[^/]*", several.sub(".*", path)), path) for path in DOCUMENT["paths"]]
    return [(re.compile(pattern), path) for pattern, path in found]


def _resolved(found: Json) -> Json:
    if "$ref" not in found:
        return found
    kind, name = found["$ref"].split("/")[-2:]
    resolved: Json = DOCUMENT["components"][kind][name]
    return resolved


async def hold(response: httpx.Response) -> None:
    """An event hook of httpx."""
    request = response.request
    path = next((path for pattern, path in _patterns() if pattern.fullmatch(request.url.path)), None)
    how = DOCUMENT["paths"].get(path, {}).get(request.method.lower())
    if response.status_code in (404, 405) and how is None:
        check({"$ref": "#/components/schemas/ErrorBody"}, json.loads(await response.aread()), "no route")
        return
    what = f"{response.status_code} of {request.method} {path}"
    assert how is not None, f"{what} is not in the document"
    assert str(response.status_code) in how["responses"], f"{what} is not in the document: {await response.aread()!r}"
    answer = _resolved(how["responses"][str(response.status_code)])
    for name, header in answer["headers"].items():
        assert name in response.headers or not _resolved(header)["required"], f"{what} has no header {name}"
    kind = response.headers.get("content-type", "").split(";")[0]
    assert kind in (answer.get("content") or [""]), f"{what} is {kind!r}"
    if kind == "application/json":
        check(answer["content"][kind]["schema"], json.loads(await response.aread()), what)
    asked = how.get("requestBody", {}).get("content", {}).get("application/json")
    if asked and response.status_code < 400:
        check(asked["schema"], json.loads(request.content), f"the body of a {what}, which was taken,")
