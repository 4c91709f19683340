"""Llama 3.2 and 4, ToolACE: the whole text is one Python list of calls, `[weather(city="Delft"), now()]`.

As vLLM's `pythonic`: keyword arguments with literal values, null, true and false among them; a text that is anything else
is content. A text that does not begin like such a list is content at once, every other one when it has ended.
"""

import ast
import json
import re
import warnings
from typing import Any

from server.toolcalls.deltas import Call, Delta, attempt, content

_NAME = r"[a-zA-Z]\w*"
_BEGINNING = re.compile(rf"\[(?:{_NAME}(?:\(.*)?)?", re.DOTALL)
_CALLED = re.compile(rf"\[{_NAME}\(")
# What vLLM's own expression accepts, without its nested repetitions: calls without arguments, then the last of them or
# one with arguments, after which anything may stand before the closing brackets.
_BARE = rf"{_NAME}\(\)"
_LIST = re.compile(rf"\[(?:{_BARE},\s*)*(?:{_BARE}\s*)*(?:{_BARE}\s*\]|(?P<given>{_NAME}\({_NAME}=))")
_CLOSING = re.compile(r"\)\s*\]")
_JSON_NAMES = {"null": None, "true": True, "false": False}


class Pythonic:
    def __init__(self) -> None:
        self.malformed = False
        self._held: list[str] = []
        self._called = False  # the text begins with "[name("
        self._through = False

    def feed(self, text: str) -> list[Delta]:
        if self._through:
            return content(text)
        self._held.append(text)
        if self._called:
            return []
        begun = "".join(self._held)
        self._called = _CALLED.match(begun) is not None
        self._through = bool(begun) and _BEGINNING.fullmatch(begun) is None
        if not self._through:
            return []
        return content(begun)

    def finish(self) -> list[Delta]:
        if self._through:
            return []
        text = "".join(self._held)
        calls = attempt(_read, text) if self._called else None
        self.malformed = self._called and calls is None
        return [*calls] if calls else content(text)


def _read(text: str) -> list[Call]:
    found = _LIST.match(text)
    if not found or (found["given"] and not _CLOSING.search(text, found.end())):
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in strings: the model's affair
        tree = ast.parse(text)
    # vLLM reads the first statement and takes no notice of others.
    listed = getattr(tree.body[0], "value", None)
    if not isinstance(listed, ast.List):
        return []
    return [_call(node, text) for node in listed.elts]


def _call(node: ast.expr, text: str) -> Call:
    if not isinstance(node, ast.Call):
        raise TypeError("not a call")
    given = {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    arguments = json.dumps(given, ensure_ascii=False)
    return Call(_dotted_name(node.func), arguments, ast.get_source_segment(text, node) or "")


def _dotted_name(node: ast.expr) -> str:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise TypeError("not a name")
    return ".".join([node.id, *reversed(parts)])


def _value(node: ast.expr) -> Any:
    """A literal as the JSON value that it stands for. Raises as `attempt` expects."""
    match node:
        case ast.Constant(value=None | str() | int() | float()):
            return node.value
        case ast.Dict(keys=keys) if all(isinstance(key, ast.Constant) for key in keys):
            pairs = zip(keys, node.values, strict=True)
            return {key.value: _value(value) for key, value in pairs if isinstance(key, ast.Constant)}
        case ast.List() | ast.Tuple() | ast.Set():
            return [_value(element) for element in node.elts]
        case ast.JoinedStr(values=values) if all(isinstance(part, ast.Constant) for part in values):
            return "".join(str(part.value) for part in values if isinstance(part, ast.Constant))
        case ast.Name(id=name) if name in _JSON_NAMES:
            return _JSON_NAMES[name]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            number = _value(node.operand)
            if isinstance(number, int | float) and not isinstance(number, bool):
                return -number if isinstance(node.op, ast.USub) else number
    raise TypeError("not a literal")
