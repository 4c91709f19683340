"""The wire form of `tools`, `tool_choice` and `parallel_tool_calls`: what they may say -> ToolUse."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from server.core import Tool, ToolUse
from server.parameters import problem_of
from server.wire import WireModel, missing_field, wrong_field


class FunctionBody(WireModel):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_parameters(self) -> Self:
        if self.parameters is not None and (problem := problem_of(self.parameters)):
            raise wrong_field("parameters", problem)
        return self


class ToolBody(WireModel):
    type: Literal["function"]
    function: FunctionBody

    def to_tool(self) -> Tool:
        return Tool(self.function.name, self.function.description, self.function.parameters)


def tool_use(tools: Sequence[ToolBody] | None, choice: Any, parallel: bool | None) -> ToolUse | None:
    """None where no tools are given. Raises the complaints of wire.py."""
    if tools is None:
        if choice not in (None, "none"):
            raise wrong_field("tool_choice", "tool_choice needs tools")
        return None
    if not tools:
        raise wrong_field("tools", "tools is empty; give at least one, or leave the field out")
    found = tuple(tool.to_tool() for tool in tools)
    seen: set[str] = set()
    for position, tool in enumerate(found):
        if tool.name in seen:
            raise wrong_field(f"tools.{position}.function.name", f"there are two tools of the name {tool.name!r}")
        seen.add(tool.name)
    together = parallel is not False
    if choice is None:
        return ToolUse(found, "auto", None, together)
    if choice in ("auto", "none", "required"):
        return ToolUse(found, choice, None, together)
    if isinstance(choice, dict) and choice.get("type") == "function":
        named = _name(choice.get("function"), "tool_choice.function", seen)
        return ToolUse(found, "named", named, together)
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return _allowed(choice.get("allowed_tools"), found, together)
    raise wrong_field(
        "tool_choice.type" if isinstance(choice, dict) else "tool_choice",
        'tool_choice is "auto", "none", "required", or an object of type "function" or "allowed_tools"',
    )


def _allowed(body: Any, tools: Sequence[Tool], parallel: bool) -> ToolUse:
    """Only the allowed tools remain, as if the request had named no others."""
    field = "tool_choice.allowed_tools"
    if not isinstance(body, dict):
        raise wrong_field(field, "allowed_tools is an object with mode and tools")
    mode, listed = body.get("mode"), body.get("tools")
    if mode not in ("auto", "required"):
        raise wrong_field(f"{field}.mode", 'mode is "auto" or "required"')
    if not isinstance(listed, list) or not listed:
        raise wrong_field(f"{field}.tools", "tools is a list with at least one tool")
    known = {tool.name for tool in tools}
    names = set()
    for position, entry in enumerate(listed):
        at = f"{field}.tools.{position}"
        if not isinstance(entry, dict) or entry.get("type") != "function":
            raise wrong_field(at, 'an allowed tool is an object of type "function"')
        names.add(_name(entry.get("function"), f"{at}.function", known))
    return ToolUse(tuple(tool for tool in tools if tool.name in names), mode, None, parallel)


def _name(function: Any, field: str, known: set[str]) -> str:
    if not isinstance(function, dict):
        raise missing_field(field, 'give {"type": "function", "function": {"name": ...}}')
    name = function.get("name")
    if not isinstance(name, str):
        raise wrong_field(f"{field}.name", "name is the name of a tool")
    if name not in known:
        raise wrong_field(f"{field}.name", f"{name[:64]!r} is none of the request's tools")
    return name
