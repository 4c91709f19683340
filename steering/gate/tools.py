"""The tools that labelling runs: literal results, safe arithmetic, a dict of facts, or a tool server."""

from __future__ import annotations

import ast
import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from steering.errors import EndpointError
from steering.gate.endpoint import Endpoint
from steering.gate.tasks import Task
from steering.matching import normalised

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_SIGNS = re.compile(r"[\d.+*/%()\s-]{1,400}", re.ASCII)
_MAX_BITS = 4096


class Toolbox:
    """Answers a task's calls. A call that cannot be answered gets a text that says so, as a model would be told."""

    def __init__(self, facts: Mapping[str, str], server: Endpoint | None, url: str = "") -> None:
        self._facts = {normalised(key): value for key, value in facts.items()}
        self._server = server
        self._url = url

    async def run(self, task: Task, name: str, arguments: str) -> str:
        """`arguments` is canonical JSON. Raises EndpointError where the tool server fails."""
        literal = task.literal(name)
        if arguments in literal:
            return _text(literal[arguments])
        try:
            given = json.loads(arguments)
        except ValueError:
            return "error: the arguments are not JSON"
        if not isinstance(given, dict):
            return "error: the arguments are not an object"
        executor = task.executors.get(name)
        if executor == "calculator":
            return calculated(given.get("expression"))
        if executor == "lookup":
            return self._facts.get(normalised(str(given.get("key", ""))), "not found")
        if self._server is not None and name in task.kinds:
            found = await self._server.post(self._url, {"name": name, "arguments": given})
            if "result" not in found:
                raise EndpointError(f"the tool server's answer to {name} holds no 'result'")
            return _text(found["result"])
        return f"error: no result of {name} for these arguments" if name in task.kinds else f"error: no tool {name}"


def calculated(expression: object) -> str:
    """Numbers, + - * / // % ** and brackets; anything else is an error in words. Sizes are bounded before computing."""
    if not isinstance(expression, str) or not _SIGNS.fullmatch(expression):
        return "error: expression must be up to 400 digits and + - * / // % ** ( )"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        return f"error: {error}"
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _bounded(_UNARY[type(node.op)](_value(node.operand)))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) * max(_bits(left), 1) > _MAX_BITS:
            raise ValueError("the power is too large")
        return _bounded(_BINARY[type(node.op)](left, right))
    raise ValueError("only numbers, + - * / // % ** and brackets are known")  # 1(2), ()


def _bounded(value: Any) -> int | float:
    if not isinstance(value, int | float):
        raise ValueError("the result is no real number")
    if _bits(value) > _MAX_BITS or not math.isfinite(value):
        raise ValueError("the number is too large")
    return value


def _bits(value: float) -> int:
    return value.bit_length() if isinstance(value, int) else 64


def _text(result: Any) -> str:
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
