"""The wire form of `response_format` (OpenAI's) and `structured_outputs` (vLLM's): what the text is held to -> Structure."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from server.core import Structure
from server.parameters import schema_problem
from server.wire import OwnModel, WireModel, missing_field, wrong_field

MAX_RULE = 8192  # characters of a regular expression or a grammar
MAX_CHOICES = 256
MAX_CHOICE = 1024  # characters of one

Rule = Annotated[str, Field(min_length=1, max_length=MAX_RULE)]
Choice = Annotated[str, Field(min_length=1, max_length=MAX_CHOICE)]


class JsonSchemaBody(WireModel):
    name: str | None = None
    content: Annotated[dict[str, Any], Field(alias="schema")]

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if problem := schema_problem(self.content):
            raise wrong_field("schema", problem)
        return self


class ResponseFormat(WireModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaBody | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise missing_field("json_schema", 'response_format of type "json_schema" needs json_schema')
        return self

    def to_structure(self) -> Structure | None:
        """None = any text."""
        if self.type == "text":
            return None
        if self.type == "json_object" or self.json_schema is None:
            return Structure("json_object", "response_format")
        return Structure("json_schema", "response_format", json.dumps(self.json_schema.content))


class StructuredOutputs(OwnModel):
    """Exactly one of them; `json` is a schema, or its text."""

    schema_or_text: Annotated[str | dict[str, Any] | None, Field(alias="json")] = None
    json_object: Literal[True] | None = None
    regex: Rule | None = None
    choice: Annotated[list[Choice], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)] | None = None
    grammar: Rule | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = (self.schema_or_text, self.json_object, self.regex, self.choice, self.grammar)
        if sum(one is not None for one in given) != 1:
            raise wrong_field("json", "give exactly one of json, json_object, regex, choice and grammar")
        if self.schema_or_text is not None and (problem := schema_problem(_decoded(self.schema_or_text))):
            raise wrong_field("json", problem)
        return self

    def to_structure(self) -> Structure:
        field = "structured_outputs"
        if self.schema_or_text is not None:
            return Structure("json_schema", field, json.dumps(_decoded(self.schema_or_text)))
        if self.regex is not None:
            return Structure("regex", field, self.regex)
        if self.choice is not None:
            return Structure("choice", field, choices=tuple(self.choice))
        if self.grammar is not None:
            return Structure("grammar", field, self.grammar)
        return Structure("json_object", field)


def _decoded(schema: str | dict[str, Any]) -> dict[str, Any]:
    """Raises a validator's complaint."""
    try:
        found = json.loads(schema) if isinstance(schema, str) else schema
    except (ValueError, RecursionError):
        raise wrong_field("json", "json is a JSON schema, or its text") from None
    if not isinstance(found, dict):
        raise wrong_field("json", "json is a JSON schema, or its text")
    return found
