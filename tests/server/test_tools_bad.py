"""Every wrong tool, choice or history is refused with the dotted field, before anything runs."""

from typing import Any

import httpx
import pytest

from server.parameters import MAX_DEPTH, problem_of

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
INVALID, MISSING = "invalid_value", "missing_parameter"
USER = {"role": "user", "content": "hi"}


def tool(name: Any = "w", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def with_parameters(parameters: Any) -> list[dict[str, Any]]:
    return [tool(parameters=parameters)]


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def defs(**schemas: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": schemas}


def plain(depth: int) -> Any:
    return {"enum": plain(depth - 1)} if depth else []


PARAMETERS = "tools.0.function.parameters"
BAD_TOOLS = [
    ([], INVALID, "tools"),
    ("w", INVALID, "tools"),
    ({}, INVALID, "tools"),
    (["w"], INVALID, "tools.0"),
    ([{}], MISSING, "tools.0.type"),
    ([{"type": "function"}], MISSING, "tools.0.function"),
    ([{"type": "custom", "custom": {"name": "w"}}], INVALID, "tools.0.type"),
    ([{"type": "function", "function": "w"}], INVALID, "tools.0.function"),
    ([{"type": "function", "function": {}}], MISSING, "tools.0.function.name"),
    ([tool(5)], INVALID, "tools.0.function.name"),
    ([tool("")], INVALID, "tools.0.function.name"),
    ([tool("a b")], INVALID, "tools.0.function.name"),
    ([tool("a.b")], INVALID, "tools.0.function.name"),
    ([tool("имя")], INVALID, "tools.0.function.name"),
    ([tool("a\n")], INVALID, "tools.0.function.name"),
    ([tool("a" * 65)], INVALID, "tools.0.function.name"),
    ([tool("a"), tool("b"), tool("a")], INVALID, "tools.2.function.name"),
    ([tool(description=5)], INVALID, "tools.0.function.description"),
    ([tool(strict="yes")], INVALID, "tools.0.function.strict"),
    (with_parameters("x"), INVALID, PARAMETERS),
    (with_parameters([]), INVALID, PARAMETERS),
    (with_parameters({"type": "string"}), INVALID, PARAMETERS),
    (with_parameters({"type": ["object"]}), INVALID, PARAMETERS),
    (with_parameters({"type": None}), INVALID, PARAMETERS),
    (with_parameters({"properties": []}), INVALID, PARAMETERS),
    (with_parameters({"properties": {"a": "string"}}), INVALID, PARAMETERS),
    (with_parameters({"properties": {"a": {"type": "strin"}}}), INVALID, PARAMETERS),
    (with_parameters({"properties": {"a": {"type": [5]}}}), INVALID, PARAMETERS),
    (with_parameters({"required": "a"}), INVALID, PARAMETERS),
    (with_parameters({"required": [5]}), INVALID, PARAMETERS),
    (with_parameters({"anyOf": {}}), INVALID, PARAMETERS),
    (with_parameters({"properties": {"a": {"enum": 1}}}), INVALID, PARAMETERS),
    (with_parameters({"properties": {f"p{i}": {} for i in range(300)}}), INVALID, PARAMETERS),
    (with_parameters({"$ref": "#"}), INVALID, PARAMETERS),
    (with_parameters({"properties": {"a": {"$ref": "#"}}}), INVALID, PARAMETERS),
    (with_parameters({"properties": {"a": {"items": {"$ref": "#/properties/a"}}}}), INVALID, PARAMETERS),
    (with_parameters(defs(a={"$ref": "#/$defs/a"})), INVALID, PARAMETERS),
    (with_parameters(defs(a={"$ref": "#/$defs/b"}, b={"anyOf": [{"$ref": "#/$defs/a"}]})), INVALID, PARAMETERS),
    (with_parameters(defs(b={})), INVALID, PARAMETERS),
    (with_parameters({"$ref": "https://example.org/x"}), INVALID, PARAMETERS),
    (with_parameters({"$ref": 5}), INVALID, PARAMETERS),
    (with_parameters(nested(30)), INVALID, PARAMETERS),
    (with_parameters({"properties": {"a": {"default": plain(60)}}}), INVALID, PARAMETERS),
    ([tool(f"t{i}") for i in range(129)], INVALID, "tools"),
]


async def refused(client: httpx.AsyncClient, house: Any, body: dict[str, Any]) -> tuple[str, str | None, str]:
    body = {"model": "tiny-base", "messages": [USER], **body}
    for stream in (False, True):
        response = await client.post(CHAT, json={**body, "stream": stream})
        assert response.status_code == 400, response.text
        assert len(response.content) < 4000
    assert not house.engine.calls
    assert house.idle()
    error = response.json()["error"]
    return error["code"], error["param"], error["message"]


@pytest.mark.parametrize(("tools", "code", "param"), BAD_TOOLS)
async def test_bad_tools(client: httpx.AsyncClient, house: Any, tools: Any, code: str, param: str) -> None:
    assert (await refused(client, house, {"tools": tools}))[:2] == (code, param)


async def test_too_many_tools_name_the_setting(build: Any, settings: Any) -> None:
    edge = settings.server.model_copy(update={"max_body_bytes": 200_000})
    house = build(settings=settings.model_copy(update={"server": edge}))
    await house.gateway.start()
    async with house.client() as client:
        body = {"tools": [tool(f"t{i}") for i in range(1000)]}
        code, param, message = await refused(client, house, body)
    assert (code, param) == (INVALID, "tools")
    assert "1000 tools are more than the 128" in message
    assert "tools.max_tools" in message


CHOICE = "tool_choice"
ALLOWED = "tool_choice.allowed_tools"


def allowed(**fields: Any) -> dict[str, Any]:
    body = {"mode": "auto", "tools": [tool()], **fields}
    return {"type": "allowed_tools", "allowed_tools": body}


BAD_CHOICES = [
    ("any", INVALID, CHOICE),
    (5, INVALID, CHOICE),
    (["auto"], INVALID, CHOICE),
    (True, INVALID, CHOICE),
    ({}, INVALID, f"{CHOICE}.type"),
    ({"type": "custom", "custom": {"name": "w"}}, INVALID, f"{CHOICE}.type"),
    ({"function": {"name": "w"}}, INVALID, f"{CHOICE}.type"),
    ({"type": "function"}, MISSING, f"{CHOICE}.function"),
    ({"type": "function", "function": "w"}, MISSING, f"{CHOICE}.function"),
    ({"type": "function", "function": {}}, INVALID, f"{CHOICE}.function.name"),
    ({"type": "function", "function": {"name": 5}}, INVALID, f"{CHOICE}.function.name"),
    ({"type": "function", "function": {"name": "other"}}, INVALID, f"{CHOICE}.function.name"),
    ({"type": "allowed_tools"}, INVALID, ALLOWED),
    (allowed(mode="none"), INVALID, f"{ALLOWED}.mode"),
    (allowed(mode=None), INVALID, f"{ALLOWED}.mode"),
    (allowed(tools=[]), INVALID, f"{ALLOWED}.tools"),
    (allowed(tools={}), INVALID, f"{ALLOWED}.tools"),
    (allowed(tools=["w"]), INVALID, f"{ALLOWED}.tools.0"),
    (allowed(tools=[{"type": "mcp"}]), INVALID, f"{ALLOWED}.tools.0"),
    (allowed(tools=[tool(), tool("other")]), INVALID, f"{ALLOWED}.tools.1.function.name"),
]


@pytest.mark.parametrize(("choice", "code", "param"), BAD_CHOICES)
async def test_bad_choices(client: httpx.AsyncClient, house: Any, choice: Any, code: str, param: str) -> None:
    assert (await refused(client, house, {"tools": [tool()], "tool_choice": choice}))[:2] == (code, param)


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "w"}}, allowed()])
async def test_a_choice_needs_tools(client: httpx.AsyncClient, house: Any, choice: Any) -> None:
    for tools in ({}, {"tools": None}):
        assert (await refused(client, house, {**tools, "tool_choice": choice}))[:2] == (INVALID, "tool_choice")


async def test_parallel_tool_calls_is_a_boolean(client: httpx.AsyncClient, house: Any) -> None:
    body = {"tools": [tool()], "parallel_tool_calls": "no"}
    assert (await refused(client, house, body))[:2] == (INVALID, "parallel_tool_calls")


def call(id: Any = "c1", arguments: Any = "{}", **fields: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "w", "arguments": arguments}, **fields}


def calls(*entries: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": list(entries), **fields}


def answer(**fields: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "c1", "content": "8", **fields}


ARGUMENTS = "messages.1.tool_calls.0.function.arguments"
BAD_MESSAGES = [
    ([USER, answer()], INVALID, "messages.1.tool_call_id"),
    ([USER, {"role": "assistant", "content": "x"}, answer()], INVALID, "messages.2.tool_call_id"),
    ([USER, calls(call()), answer(tool_call_id="c2")], INVALID, "messages.2.tool_call_id"),
    ([USER, answer(), calls(call())], INVALID, "messages.1.tool_call_id"),
    ([USER, calls(call()), {"role": "tool", "content": "8"}], MISSING, "messages.2.tool_call_id"),
    ([USER, calls(call()), answer(tool_call_id=5)], INVALID, "messages"),
    ([USER, calls(call()), answer(content=None)], MISSING, "messages.2.content"),
    ([USER, calls(call(arguments="{"))], INVALID, ARGUMENTS),
    ([USER, calls(call(arguments="city: A"))], INVALID, ARGUMENTS),
    ([USER, calls(call(arguments="[" * 5000))], INVALID, ARGUMENTS),
    ([USER, calls(call(arguments="[" * 100 + "]" * 100))], INVALID, ARGUMENTS),
    ([USER, calls(call(arguments={"city": "A"}))], INVALID, "messages"),
    ([USER, calls(call(), call())], INVALID, "messages.1.tool_calls"),
    ([USER, calls(call(id=None))], INVALID, "messages"),
    ([USER, calls(call(type="custom"))], INVALID, "messages"),
    ([USER, calls()], MISSING, "messages.1.content"),
    ([USER, {"role": "assistant"}], MISSING, "messages.1.content"),
    ([USER, {"role": "assistant", "content": None}], MISSING, "messages.1.content"),
    ([{"role": "user"}], MISSING, "messages.0.content"),
    ([{**USER, "tool_calls": [call()]}], INVALID, "messages.0.tool_calls"),
    ([USER, {"role": "function", "name": "w", "content": "8"}], INVALID, "messages"),
]


@pytest.mark.parametrize(("messages", "code", "param"), BAD_MESSAGES)
async def test_bad_history(client: httpx.AsyncClient, house: Any, messages: Any, code: str, param: str) -> None:
    assert (await refused(client, house, {"messages": messages}))[:2] == (code, param)


async def test_functions_are_refused(client: httpx.AsyncClient, house: Any) -> None:
    assert (await refused(client, house, {"functions": [{"name": "w"}]}))[:2] == ("unsupported_parameter", "functions")


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        {},
        {"type": "object"},
        {"properties": {"required": {"type": "boolean"}, "$ref": {"type": "string"}, "properties": {}, "enum": {}}},
        {"properties": {"a": True, "b": {"type": ["string", "null"]}}, "additionalProperties": False},
        defs(a={"anyOf": [{"$ref": "#/$defs/b"}, {"$ref": "#/$defs/b"}]}, b={"type": "integer"}),
        {"definitions": {"a/b~": {}}, "properties": {"x": {"$ref": "#/definitions/a~1b~0"}}},
        {"properties": {"a": {"const": {"$ref": "#", "type": "none"}, "default": [[]]}}},
        nested(MAX_DEPTH // 2),
    ],
)
async def test_good_schemas(client: httpx.AsyncClient, house: Any, parameters: Any) -> None:
    house.engine.texts[0] = ("[]",)
    for choice in ("auto", "required"):
        body = {"model": "tiny-base", "messages": [USER], "tools": with_parameters(parameters), "tool_choice": choice}
        response = await client.post(CHAT, json=body)
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("reference", ["#", "#/$defs/a", "#/properties/b"])
def test_a_schema_without_end_is_told_from_a_deep_one(reference: str) -> None:
    schema = {"properties": {"b": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"items": {"$ref": reference}}}}
    assert "refers to itself" in (problem_of(schema) or "")
    assert "nested more than" in (problem_of(nested(30)) or "")


def test_references_that_multiply_are_followed_once() -> None:
    """Each schema names the next one nine times: more ways through it than could be gone, and one visit each."""
    schemas = {f"s{i}": {"anyOf": [{"$ref": f"#/$defs/s{i + 1}"}] * 9} for i in range(14)} | {"s14": {}}
    assert problem_of({"$ref": "#/$defs/s0", "$defs": schemas}) is None
    long = {f"s{i}": {"$ref": f"#/$defs/s{i + 1}"} for i in range(5000)} | {"s5000": {}}
    assert problem_of({"$ref": "#/$defs/s0", "$defs": long}) is not None
