"""The OpenAPI 3.1 document of a table of routes: schemas from the wire models and the answers' types, errors from the one table."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode

from server.answers import ByKind, ErrorBody, Text, Told
from server.build import installed
from server.errors import Mapping

Json = dict[str, Any]

_REF = "#/components/schemas/{model}"
_ABOUT = (
    "One base model and its fine-tunes over OpenAI's API; server/README.md says what the fields mean. Every error on every path, "
    "also 404 `route_not_found` and 405 `method_not_allowed` of paths and methods that are not here, has the one body `ErrorBody`. "
    "A stream that fails after its first byte ends with that body as an event, then `[DONE]`."
)
_SCOPES = {
    "inference": "A key with the scope inference. A server on which no key has it answers everybody.",
    "admin": "A key with the scope admin. On a server on which no key has it these paths are closed: 403 `admin_disabled`.",
}
_HEADERS = {
    "x-request-id": (
        True,
        "the client's, where it is of that form",
        {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,128}$"},
    ),
    "x-gateway-version": (True, "the version of the server", {"type": "string"}),
    "www-authenticate": (True, "the scheme of the keys", {"type": "string", "const": "Bearer"}),
    "retry-after": (False, "seconds, where trying again may help", {"type": "string", "pattern": "^[0-9]+$"}),
    "retry-after-ms": (False, "the same in milliseconds", {"type": "string", "pattern": "^[0-9]+$"}),
    "x-should-retry": (False, "false where it cannot help", {"type": "string", "const": "false"}),
    "location": (True, "the path of the name", {"type": "string"}),
    "etag": (True, "the digest of the artifact", {"type": "string", "pattern": '^"[0-9a-f]{64}"$'}),
}
_EVERYWHERE = ("x-request-id", "x-gateway-version")
_RETRIES = ("retry-after", "retry-after-ms")
_OF_STATUS = {
    401: ("www-authenticate",),
    409: ("x-should-retry",),
    429: _RETRIES,
    503: _RETRIES,
    507: ("x-should-retry",),
}
_REASONS = {
    200: "done",
    201: "a new version",
    202: "begun",
    204: "done",
    400: "the request is wrong",
    401: "no key, or none that is known",
    403: "not with this key",
    404: "not there",
    408: "the body came too slowly",
    409: "not in this state",
    411: "no Content-Length",
    413: "too large",
    429: "over a limit of the key, or another upload is at it",
    500: "the server's fault",
    503: "not now",
    504: "not in time",
    507: "there is no room",
}


@dataclass(frozen=True)
class Parameter:
    name: str
    where: str  # path, query or header
    required: bool
    annotation: Any


@dataclass(frozen=True)
class Operation:
    """A route as its handler's signature tells it; `failures`: how its errors are answered."""

    access: str
    method: str
    path: str
    handler: Callable[..., Any]
    parameters: Sequence[Parameter]
    body: type[BaseModel] | None
    told: Told
    failures: Sequence[Mapping]


class _Plain(GenerateJsonSchema):
    """Without titles, which only repeat names; answers may come to hold more than a client knows."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: Any) -> Json:
        found = super().model_schema(schema)
        if self.mode == "serialization":
            found.pop("additionalProperties", None)
        return found


class _Schemas:
    """The schemas of all types of a document, made together so that they share components."""

    def __init__(self, types: Iterable[tuple[Any, JsonSchemaMode]]) -> None:
        adapters = {(repr(annotation), mode): TypeAdapter(annotation) for annotation, mode in types}
        inputs = [(name, mode, adapter) for (name, mode), adapter in adapters.items()]
        self._found, shared = TypeAdapter.json_schemas(inputs, ref_template=_REF, schema_generator=_Plain)
        self.components = {name: _untitled(schema) for name, schema in sorted(shared.get("$defs", {}).items())}

    def of(self, annotation: Any, mode: JsonSchemaMode = "serialization") -> Json:
        return _untitled(self._found[repr(annotation), mode])


def _untitled(schema: Json) -> Json:
    return {key: value for key, value in schema.items() if key != "title"}


def document(operations: Sequence[Operation]) -> Json:
    schemas = _Schemas(found for operation in operations for found in _types(operation))
    problems = _Problems()
    paths: dict[str, Json] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, schemas, problems)
    schemes = {scope: {"type": "http", "scheme": "bearer", "description": about} for scope, about in _SCOPES.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Deltaworks", "version": installed().version, "description": _ABOUT},
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "responses": problems.components,
            "headers": {
                name: {"description": about, "required": always, "schema": schema}
                for name, (always, about, schema) in _HEADERS.items()
            },
            "securitySchemes": schemes,
        },
    }


def _types(operation: Operation) -> Iterator[tuple[Any, JsonSchemaMode]]:
    told = operation.told
    yield ErrorBody, "serialization"
    for parameter in operation.parameters:
        yield parameter.annotation, "validation"
    for body in filter(None, (operation.body, told.form)):
        yield body, "validation"
    for shape in (*told.bodies.values(), told.events):
        if (shape := _shape(shape, operation.path)) is not None and not isinstance(shape, Text):
            yield shape, "serialization"


def _shape(shape: Any, path: str) -> Any:
    return shape.shapes[path.split("/")[3]] if isinstance(shape, ByKind) else shape


def _operation(operation: Operation, schemas: _Schemas, problems: "_Problems") -> Json:
    told = {str(status): _answer(operation, status, schemas) for status in operation.told.bodies}
    failures = problems.of(operation.failures)
    clash = told.keys() & failures.keys()
    assert not clash, f"{operation.path}: {clash} is an answer and an error"
    summary, _, _ = (operation.handler.__doc__ or "").strip().partition("\n\n")
    name = operation.path.strip("/").replace("/", "_").replace("{", "").replace("}", "")
    found: Json = {
        "operationId": f"{operation.method.lower()}_{name}",
        "tags": [operation.access],
        **({"description": summary} if summary else {}),
        "responses": dict(sorted({**told, **failures}.items())),
    }
    parameters = [_parameter(parameter, schemas) for parameter in operation.parameters]
    if operation.told.form is not None:
        parameters += _query_of_form(schemas, operation.told.form)
        found["requestBody"] = _upload(schemas, operation.told.form)
    if operation.body is not None:
        content = {"application/json": {"schema": schemas.of(operation.body, "validation")}}
        found["requestBody"] = {"required": True, "content": content}
    if parameters:
        found["parameters"] = parameters
    if operation.access in _SCOPES:
        found["security"] = [{operation.access: []}]
    return found


def _parameter(parameter: Parameter, schemas: _Schemas) -> Json:
    return {
        "name": parameter.name,
        "in": parameter.where,
        "required": parameter.required,
        "schema": _as_text(schemas.of(parameter.annotation, "validation")),
    }


def _answer(operation: Operation, status: int, schemas: _Schemas) -> Json:
    shape = _shape(operation.told.bodies[status], operation.path)
    found: Json = {
        "description": _REASONS[status],
        "headers": _headers((*_EVERYWHERE, *operation.told.headers)),
    }
    if isinstance(shape, Text):
        found["content"] = {kind: {"schema": {"type": "string"}} for kind in shape.media_types}
    elif shape is not None:
        found["content"] = {"application/json": {"schema": schemas.of(shape)}}
    if operation.told.events is not None:
        found["content"]["text/event-stream"] = {"schema": _event(schemas.of(operation.told.events))}
    return found


def _event(data: Json) -> Json:
    """Each event of a stream; before OpenAPI 3.2 tools take the schema of a stream for that."""
    kinds = {"anyOf": [data, {"$ref": _REF.format(model="ErrorBody")}]}
    told = {"contentMediaType": "application/json", "contentSchema": kinds}
    about = "Each event. The last one is [DONE], and the one before it an ErrorBody where the stream failed."
    properties = {"data": {"type": "string", "anyOf": [{"const": "[DONE]"}, told]}}
    return {"type": "object", "description": about, "properties": properties, "required": ["data"]}


def _headers(names: Iterable[str]) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


class _Problems:
    """The responses that are errors: one component for each status with the same codes."""

    def __init__(self) -> None:
        self.components: Json = {}
        self._names: dict[tuple[int, tuple[str, ...]], str] = {}

    def of(self, failures: Sequence[Mapping]) -> Json:
        codes: dict[int, set[str]] = {}
        for mapping in failures:
            codes.setdefault(mapping.status, set()).add(mapping.code)
        return {str(status): {"$ref": self._of_status(status, tuple(sorted(codes[status])))} for status in codes}

    def _of_status(self, status: int, codes: tuple[str, ...]) -> str:
        if (status, codes) not in self._names:
            again = sum(known == status for known, _ in self._names)
            self._names[status, codes] = name = f"Problem{status}" + (f"_{again + 1}" if again else "")
            said = {"properties": {"error": {"properties": {"code": {"enum": list(codes)}}}}}
            schema = {"allOf": [{"$ref": _REF.format(model="ErrorBody")}, said]}
            self.components[name] = {
                "description": f"{_REASONS[status]}: {', '.join(codes)}",
                "headers": _headers((*_EVERYWHERE, *_OF_STATUS.get(status, ()))),
                "content": {"application/json": {"schema": schema}},
            }
        return f"#/components/responses/{self._names[status, codes]}"


def _as_text(schema: Json) -> Json:
    """Of a field that is no JSON: null is said by leaving it out."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    rest = {key: value for key, value in schema.items() if key != "anyOf" and not (key == "default" and value is None)}
    return rest | kinds[0] if len(kinds) == 1 else schema


def _fields(schemas: _Schemas, form: type[BaseModel]) -> Json:
    """The schema of the form's fields, in place."""
    name = schemas.of(form, "validation")["$ref"].rsplit("/")[-1]
    fields: Json = schemas.components[name]
    return {**fields, "properties": {name: _as_text(field) for name, field in fields["properties"].items()}}


def _upload(schemas: _Schemas, form: type[BaseModel]) -> Json:
    """A form, or the file as the body itself."""
    fields = _fields(schemas, form)
    file = {"type": "string", "format": "binary"}
    about = "The file; its fields are the query. Content-Digest (RFC 9530, sha-256) may stand for sha256."
    whole = {
        **fields,
        "properties": {"file": file, **fields["properties"]},
        "required": ["file", *fields["required"]],
    }
    content = {
        "multipart/form-data": {"schema": whole},
        "application/octet-stream": {"schema": {**file, "description": about}},
    }
    return {"required": True, "content": content}


def _query_of_form(schemas: _Schemas, form: type[BaseModel]) -> list[Json]:
    """The same fields where the file is the body; beside a form there is no query."""
    about = "where the body is the file"
    return [
        {"name": name, "in": "query", "required": False, "description": about, "schema": schema}
        for name, schema in _fields(schemas, form)["properties"].items()
    ]
