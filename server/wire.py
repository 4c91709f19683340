"""How JSON and form fields are read: the base of all wire models, and what a reader's complaint becomes."""

from collections.abc import Mapping
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from server.core import GatewayError, InvalidRequest

# Fields of the request in which a mistake is named to the last part. Validators of our own do so everywhere.
_DOTTED = ("steering", "conflict", "tools", "tool_choice", "tool_gate", "delta")
_OWN_ERRORS = ("missing_at", "wrong_at")
_MAX_PARAM = 200


class InvalidJson(GatewayError):
    """The body is not JSON."""


class MissingParameter(GatewayError):
    """A required field is absent."""


class UnsupportedParameter(GatewayError):
    """A known field asks for something that this gateway does not do."""


class WireModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=True)


class OwnModel(WireModel):
    """Objects that are ours, not OpenAI's: an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid")


Body = TypeVar("Body", bound=BaseModel)


def parse(model: type[Body], body: bytes) -> Body:
    """Raises InvalidJson, MissingParameter, UnsupportedParameter, InvalidRequest."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False, include_input=False)) from None


def check(model: type[Body], fields: Mapping[str, str]) -> Body:
    """Form and query fields, whose values are text. Raises as `parse`."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False, include_input=False)) from None


def unsupported(param: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported", "{param} is not supported", {"param": param})


def missing_field(field: str, message: str) -> PydanticCustomError:
    """A validator's complaint that `field` of the object it looks at is absent."""
    return PydanticCustomError("missing_at", "{message}", {"field": field, "message": message})


def wrong_field(field: str, message: str) -> PydanticCustomError:
    """A validator's complaint about `field` (dotted) of the object it looks at."""
    return PydanticCustomError("wrong_at", "{message}", {"field": field, "message": message})


def _explain(details: list[ErrorDetails]) -> GatewayError:
    first = details[0]
    if first["type"] == "json_invalid":
        return InvalidJson(f"the body is not valid JSON: {first['ctx']['error']}")
    param = _param(first)
    problems = "; ".join(f"{'.'.join(map(str, d['loc'])) or 'body'}: {d['msg']}"[:300] for d in details[:5])
    if first["type"] in ("missing", "missing_at"):
        return MissingParameter(problems, param=param)
    if first["type"] == "unsupported":
        return UnsupportedParameter(first["msg"], param=first["ctx"]["param"])
    return InvalidRequest(problems, param=param)


def _param(detail: ErrorDetails) -> str | None:
    path = list(detail["loc"])
    if detail["type"] in _OWN_ERRORS:
        path.append(detail["ctx"]["field"])
    elif path and path[0] not in _DOTTED:
        del path[1:]
    return ".".join(map(str, path))[:_MAX_PARAM] or None


class AliasMove(OwnModel):
    """Body of PUT /v1/admin/KIND/{name}/alias."""

    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    expected_generation: Annotated[int, Field(ge=0)]


class UploadFields(OwnModel):
    """What an upload says about its file, as form parts or as query; text values, so they are read leniently."""

    model_config = ConfigDict(strict=False)

    name: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    expected_generation: Annotated[int, Field(ge=0)] | None = None
    activate: bool = True
