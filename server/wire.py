"""How JSON and form fields are read: the base of all wire models, and what a reader's complaint becomes."""

import difflib
import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from server.core import GatewayError, InvalidRequest

# Fields of the request in which a mistake is named to the last part. Validators of our own do so everywhere.
_DOTTED = (
    "steering",
    "conflict",
    "tools",
    "tool_choice",
    "tool_gate",
    "delta",
    "response_format",
    "structured_outputs",
)
_OWN_ERRORS = ("missing_at", "wrong_at")
_MAX_PARAM = 200
MAX_PROBLEMS = 10
MAX_KEYS = 4096  # of one object: none of ours comes near, and every unknown one would be a problem to tell
_MAX_PROBLEM = 200  # characters of one
MAX_KEY = 64  # characters of a key that a message repeats
_MAX_UNREAD = 64  # names of fields that the log tells

log = logging.getLogger("deltaworks.wire")


class InvalidJson(GatewayError):
    """The body is not JSON."""


class MissingParameter(GatewayError):
    """A required field is absent."""


class UnsupportedParameter(GatewayError):
    """A known field asks for something that this gateway does not do."""


class WireModel(BaseModel):
    """`unserved`: fields that would change the answer and that we do not do, refused wherever they say anything."""

    unserved: ClassVar[Collection[str]] = ()
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=True)


class OwnModel(WireModel):
    """Objects that are ours, not OpenAI's: an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid")


Body = TypeVar("Body", bound=BaseModel)


class Unread:
    """Which fields of requests nobody reads; the log tells each name once, and of a flood of names the first ones."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def note(self, fields: Collection[str]) -> None:
        new = {field[:MAX_KEY] for field in fields} - self._told
        for field in sorted(new)[: _MAX_UNREAD - len(self._told)]:
            self._told.add(field)
            log.info("a field that nothing reads", extra={"fields": {"field": field}})


def parse(model: type[Body], body: bytes, unread: Unread | None = None) -> Body:
    """Raises InvalidJson, MissingParameter, UnsupportedParameter, InvalidRequest."""
    found = _decode(body)
    if isinstance(found, dict) and issubclass(model, WireModel):
        for field in model.unserved:
            if found.get(field):
                raise UnsupportedParameter(f"{field} is not supported", param=field)
        if unread is not None and model.model_config.get("extra") == "ignore":
            unread.note(found.keys() - model.model_fields.keys())
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _explain(model, error.errors(include_url=False, include_input=False)) from None


def check(model: type[Body], fields: Mapping[str, str]) -> Body:
    """Form and query fields, whose values are text. Raises as `parse`."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _explain(model, error.errors(include_url=False, include_input=False)) from None


def unsupported(param: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported", "{param} is not supported", {"param": param})


def missing_field(field: str, message: str) -> PydanticCustomError:
    """A validator's complaint that `field` of the object it looks at is absent."""
    return PydanticCustomError("missing_at", "{message}", {"field": field, "message": message})


def wrong_field(field: str, message: str) -> PydanticCustomError:
    """A validator's complaint about `field` (dotted) of the object it looks at."""
    return PydanticCustomError("wrong_at", "{message}", {"field": field, "message": message})


def _decode(body: bytes) -> Any:
    """Refuses what pydantic's reader lets through: keys that are given twice, numbers that are none.

    Raises InvalidJson, InvalidRequest.
    """
    try:
        return json.loads(
            body.decode(), object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite_number
        )
    except RecursionError:
        raise InvalidJson("the body is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise InvalidJson(f"the body is not valid JSON: {reason}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise InvalidRequest(f"an object of the body has more than {MAX_KEYS} keys")
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidJson(f"the body is not valid JSON: the key {key[:MAX_KEY]!r} is given twice")
            seen.add(key)
    return found


def _no_number(text: str) -> float:
    raise InvalidJson(f"the body is not valid JSON: {text} is no number")


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise InvalidJson("the body is not valid JSON: a number is too large")
    return number


def _explain(model: type[BaseModel], details: list[ErrorDetails]) -> GatewayError:
    first = details[0]
    if first["type"] == "json_invalid":
        return InvalidJson(f"the body is not valid JSON: {first['ctx']['error']}")
    param = _param(first)
    problems = "; ".join(_problem(model, detail)[:_MAX_PROBLEM] for detail in details[:MAX_PROBLEMS])
    if first["type"] in ("missing", "missing_at"):
        return MissingParameter(problems, param=param)
    if first["type"] == "unsupported":
        return UnsupportedParameter(first["msg"], param=first["ctx"]["param"])
    return InvalidRequest(problems, param=param)


def _problem(model: type[BaseModel], detail: ErrorDetails) -> str:
    path = detail["loc"]
    message = detail["msg"]
    if detail["type"] == "extra_forbidden":
        message = unknown_key(str(path[-1]), _keys_at(model, path[:-1]))
    return f"{'.'.join(str(part)[:MAX_KEY] for part in path) or 'body'}: {message}"


def unknown_key(key: str, known: Collection[str]) -> str:
    """What is said of it: the near one, or all that are known."""
    near = difflib.get_close_matches(key[:MAX_KEY], sorted(known), n=1)
    told = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known)) or 'none'}"
    return f"unknown key; {told}"


def _keys_at(model: type[BaseModel], path: Sequence[int | str]) -> set[str]:
    """The keys that the objects there have. Parts of the path that are no fields number items, or name a kind of a union."""
    models = {model}
    for part in path:
        fields = [field for kind in models for name, field in kind.model_fields.items() if part in (name, field.alias)]
        models = {found for field in fields for found in _models_in(field.annotation)} or models
    return {field.alias or name for kind in models for name, field in kind.model_fields.items()}


def _models_in(annotation: Any) -> set[type[BaseModel]]:
    """The wire models that a field can hold; a root model stands for what is in it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        root = annotation.model_fields.get("root")
        return _models_in(root.annotation) if root else {annotation}
    return {found for part in get_args(annotation) for found in _models_in(part)}


def _param(detail: ErrorDetails) -> str | None:
    path = list(detail["loc"])
    if detail["type"] in _OWN_ERRORS:
        path.append(detail["ctx"]["field"])
    elif path and path[0] not in _DOTTED:
        del path[1:]
    return ".".join(map(str, path))[:_MAX_PARAM] or None


def _flag(value: object) -> object:
    if isinstance(value, str) and value not in ("true", "false"):
        raise PydanticCustomError("flag", "give true or false")
    return value


def _whole(value: object) -> object:
    if isinstance(value, str) and not (value.isascii() and value.isdecimal() and len(value) <= 18):
        raise PydanticCustomError("whole", "give a whole number in decimal digits")
    return value


# Of form and query fields: text, in the one form that JSON has for them.
Flag = Annotated[bool, BeforeValidator(_flag)]
WHOLE = BeforeValidator(_whole)


NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
# Of an artifact; what is wrong with one is told by the registry, which knows the reserved ones too.
ArtifactName = Annotated[str, Field(json_schema_extra={"pattern": NAME_PATTERN})]


class AliasMove(OwnModel):
    """Body of PUT /v1/admin/KIND/{name}/alias."""

    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    expected_generation: Annotated[int, Field(ge=0)]


class UploadFields(OwnModel):
    """What an upload says about its file, as form parts or as query; text values, so they are read leniently."""

    model_config = ConfigDict(strict=False)

    name: ArtifactName
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    base_fingerprint: Annotated[str, Field(max_length=200)] | None = None
    description: Annotated[str, Field(max_length=1000)] = ""
    expected_generation: Annotated[int, Field(ge=0), WHOLE] | None = None
    activate: Flag = True
