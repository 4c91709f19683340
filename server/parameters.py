"""JSON schemas of tools and of answers: is this one that a prompt can show and a grammar can be made of?"""

from collections.abc import Iterator
from typing import Any

MAX_DEPTH = (
    48  # of JSON values in each other, references followed; vLLM's limit is 64, with our frame around the schema
)
MAX_PROPERTIES = 256  # of one object: the time to build its grammar grows with their square

_TOO_DEEP = f"the schema is nested more than {MAX_DEPTH} levels deep"
_TYPES = {"object", "array", "string", "number", "integer", "boolean", "null"}
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # name -> schema
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = (
    *("items", "additionalProperties", "unevaluatedProperties", "unevaluatedItems", "propertyNames"),
    *("contains", "not", "if", "then", "else"),
)


class _BadSchema(Exception):
    """The message says what is wrong."""


def problem_of(schema: dict[str, Any]) -> str | None:
    """What is wrong with a tool's parameters, or None."""
    if schema.get("type", "object") != "object":
        return 'parameters is a JSON schema whose type is "object"'
    return schema_problem(schema)


def schema_problem(schema: dict[str, Any]) -> str | None:
    """What is wrong with a JSON schema of anything, or None."""
    try:
        _Walk(schema).visit(schema, 0)
    except _BadSchema as error:
        return str(error)
    return None


class _Walk:
    """Goes through every schema once, references too. One that leads back to where we are has no end."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._inside: set[int] = set()
        self._done: set[int] = set()

    def visit(self, node: Any, depth: int) -> None:
        """Raises _BadSchema."""
        if isinstance(node, bool) or id(node) in self._done:
            return
        if not isinstance(node, dict):
            raise _BadSchema(f"a JSON schema is an object, not {node!r:.100}")
        if depth > MAX_DEPTH:
            raise _BadSchema(_TOO_DEEP)
        if id(node) in self._inside:
            raise _BadSchema("the schema refers to itself; recursive schemas are not served")
        self._inside.add(id(node))
        _check_shape(node, depth)
        for child, steps in _children(node):
            self.visit(child, depth + steps)
        if "$ref" in node:
            self.visit(self._target(node["$ref"]), depth + 1)
        self._inside.discard(id(node))
        self._done.add(id(node))

    def _target(self, reference: Any) -> Any:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise _BadSchema(f"$ref {reference!r:.100} is no place of this schema, such as #/$defs/Name")
        found: Any = self._root
        for part in reference.split("/")[1:]:
            found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        if not isinstance(found, dict | bool):
            raise _BadSchema(f"$ref {reference!r:.100} leads to no schema")
        return found


def _children(node: dict[str, Any]) -> Iterator[tuple[Any, int]]:
    """The schemas inside a schema, and how many levels deeper each stands."""
    for key in _SCHEMAS:
        if key in node:
            yield node[key], 1
    for key in _LISTS:
        for child in node.get(key, ()):
            yield child, 2
    for key in _MAPS:
        for child in node.get(key, {}).values():
            yield child, 2


def _check_shape(node: dict[str, Any], depth: int) -> None:
    types = node.get("type", [])
    for kind in types if isinstance(types, list) else [types]:
        if not isinstance(kind, str) or kind not in _TYPES:
            raise _BadSchema(f"{kind!r:.100} is no type of JSON schema")
    for keys, kind, word in (
        (_MAPS, dict, "an object"),
        (_LISTS, list, "a list"),
        (("required", "enum"), list, "a list"),
    ):
        for key in keys:
            if not isinstance(node.get(key, kind()), kind):
                raise _BadSchema(f"{key} of a JSON schema is {word}")
    if not all(isinstance(name, str) for name in node.get("required", ())):
        raise _BadSchema("required of a JSON schema lists names")
    if len(node.get("properties", ())) > MAX_PROPERTIES:
        raise _BadSchema(f"an object of the schema has more than {MAX_PROPERTIES} properties")
    others = (node[key] for key in node.keys() - {*_SCHEMAS, *_LISTS, *_MAPS})
    if any(too_deep(value, depth + 1) for value in others):
        raise _BadSchema(_TOO_DEEP)


def too_deep(value: Any, depth: int = 0) -> bool:
    """Whether decoded JSON is nested more than MAX_DEPTH levels deep."""
    if not isinstance(value, dict | list):
        return False
    children = value.values() if isinstance(value, dict) else value
    return depth > MAX_DEPTH or any(too_deep(child, depth + 1) for child in children)
