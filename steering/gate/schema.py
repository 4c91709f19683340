"""What the gate's JSON files have in common: strict models, and errors that name the field and the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

ModelT = TypeVar("ModelT", bound=BaseModel)


class Strict(BaseModel):
    """Nothing is coerced, no key is ignored, no number is NaN or infinite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


def parse(model: type[ModelT], text: str | bytes) -> ModelT:
    """Raises ValueError whose message is one line: the field and what is wrong with it."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(_sentence(model, error)) from error


def reason(error: ValidationError) -> str:
    """The first problem as one line: the field and what is wrong with it."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def near(word: str, known: list[str]) -> str:
    """The end of a sentence about an unknown word."""
    match = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(known)}"


def _sentence(model: type[BaseModel], error: ValidationError) -> str:
    """Of several problems an unknown key comes first: a misspelt key is also a missing one."""
    details = error.errors(include_url=False, include_input=False)
    first = next((one for one in details if one["type"] == "extra_forbidden"), details[0])
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {where!r}, {near(str(first['loc'][-1]), _keys(model, first['loc'][:-1]))}"
    return reason(error)


def _keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys that the model at a path of the document has."""
    at: Any = model
    for part in path:
        at = _inside(at, part)
    return list(at.model_fields)


def _inside(kind: Any, part: int | str) -> Any:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        annotation = kind.model_fields[str(part)].annotation
        options = [one for one in get_args(annotation) if one is not type(None)]
        return options[0] if get_origin(annotation) not in (tuple, dict, list) and len(options) == 1 else annotation
    inner = get_args(kind)
    return inner[1] if get_origin(kind) in (dict, Mapping) else inner[0]
