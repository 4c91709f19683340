"""The tools of labelling: scripted results, a tool server, and arithmetic that harms nobody."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from steering.errors import EndpointError
from steering.gate.endpoint import Endpoint
from steering.gate.tasks import Task
from steering.gate.tools import Toolbox, calculated
from tests.steering.chat_server import ChatServer, serving, task
from tests.steering.gate_world import tool


@pytest.fixture
def chat() -> Iterator[ChatServer]:
    with serving() as server:
        yield server


def box(facts: dict[str, str] | None = None) -> Toolbox:
    return Toolbox(facts or {}, None)


def run(toolbox: Toolbox, given: dict[str, Any], name: str, arguments: str) -> str:
    return asyncio.run(toolbox.run(Task.model_validate_json(json.dumps(given)), name, arguments))


def test_scripted_tools() -> None:
    both = {"tools": [tool("calculator"), tool("search")], "tool_kinds": {}, "executors": {"search": "lookup"}}
    results = {"calculator": {'{"b": 2, "a": 1}': {"sum": 3}, '{"a":0}': "zero"}}
    given = task("a", 1, 2, **both, tool_results=results)
    assert run(box(), given, "calculator", '{"a":1,"b":2}') == '{"sum": 3}'
    assert run(box(), given, "calculator", '{"a":0}') == "zero"
    assert run(box(), given, "calculator", '{"a":9}') == "error: no result of calculator for these arguments"
    assert run(box(), given, "calculatr", "{}") == "error: no tool calculatr"
    assert run(box(), given, "search", "{broken") == "error: the arguments are not JSON"
    assert run(box(), given, "search", "[1]") == "error: the arguments are not an object"
    facts = box({"Capital of France": "Paris"})
    assert run(facts, given, "search", '{"key":"the capital of france?"}') == "Paris"
    assert run(facts, given, "search", '{"key":"Rome"}') == "not found"


def test_a_tool_server(chat: ChatServer) -> None:
    given = task("a", 1, 2, executors={})

    async def ask(name: str) -> str:
        async with Endpoint("", patience_s=()) as server:
            return await Toolbox({}, server, f"{chat.url}/tool").run(
                Task.model_validate_json(json.dumps(given)), name, '{"x":1}'
            )

    assert asyncio.run(ask("calculator")) == '{"told": {"x": 1}}'
    assert asyncio.run(ask("rm")) == "error: no tool rm"
    assert [body["path"] for body in chat.requests] == ["/tool"]
    chat.fail = lambda index, body: (200, "{}")
    with pytest.raises(EndpointError, match="holds no 'result'"):
        asyncio.run(ask("calculator"))


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("12345+67890", "80235"),
        (" 2 * (3 - 4.5) ", "-3"),
        ("7 / 2", "3.5"),
        ("0.1 + 0.2", "0.3"),
        ("-2 ** 2", "-4"),
        ("7 // 2 % 2", "1"),
        ("2 ** 100", str(2**100)),
        ("1 / 0", "error: division by zero"),
        ("9 ** 9 ** 9", "error: the power is too large"),
        ("(-8) ** 0.5", "error: the result is no real number"),
        ("9" * 401, "error: expression must be"),
        ("__import__('os')", "error: expression must be"),
        ("1 if 1 else 2", "error: expression must be"),
        ("1,000", "error: expression must be"),
        ("2(3)", "error: only numbers"),
        ("()", "error: only numbers"),
        ("1 +", "error: "),
        ("(" * 399, "error: "),
        ("9" * 390 + ".0", "error: the number is too large"),
        (3, "error: expression must be"),
    ],
)
def test_arithmetic_is_safe(expression: object, result: str) -> None:
    assert calculated(expression).startswith(result)
    if not result.startswith("error"):
        assert calculated(expression) == result
