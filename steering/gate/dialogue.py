"""What the gate reads from a chat request: OpenAI's messages, tools and tool_choice as plain dicts, of any shape.

The request has been checked by the server; here a part of another shape counts as absent, and nothing raises.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Dict = Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """A tool call; `arguments` is canonical JSON, so that equal calls are equal. `answered`: its result is present."""

    name: str
    arguments: str
    answered: bool = False


def text_of(message: Dict) -> str:
    """The text of a message; of parts, the text ones, a line each."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return ""
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    return "\n".join(text for text in texts if isinstance(text, str))


def last_user_text(messages: Sequence[Dict]) -> str:
    return next((text_of(one) for one in reversed(messages) if one.get("role") == "user"), "")


def since_user(messages: Sequence[Dict]) -> Sequence[Dict]:
    """The messages after the last one of the user."""
    last = max((index for index, one in enumerate(messages) if one.get("role") == "user"), default=-1)
    return messages[last + 1 :]


def in_tool_loop(messages: Sequence[Dict]) -> bool:
    """A tool has answered since the user spoke."""
    return any(one.get("role") in ("tool", "function") for one in since_user(messages))


def calls_in(messages: Sequence[Dict]) -> tuple[Call, ...]:
    """All tool calls of the assistant, in order."""
    results = {one.get("tool_call_id") for one in messages if one.get("role") == "tool"}
    found = []
    for message in messages:
        if message.get("role") == "assistant":
            for identifier, call in proposed(message.get("tool_calls")):
                found.append(replace(call, answered=identifier is not None and identifier in results))
    return tuple(found)


def proposed(tool_calls: Any) -> list[tuple[str | None, Call]]:
    """(id, call) of a message's `tool_calls`."""
    found = []
    for entry in tool_calls if isinstance(tool_calls, Sequence) and not isinstance(tool_calls, str) else ():
        function = entry.get("function") if isinstance(entry, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            found.append((entry.get("id"), Call(function["name"], canonical(function.get("arguments")))))
    return found


def canonical(arguments: Any) -> str:
    """Arguments as sorted JSON without spaces; what is not JSON stays as the text it is."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return str(arguments)
    return json.dumps(arguments, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def tool_name(tool: Dict) -> str:
    """The function's name; of a tool that is no function its type."""
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else tool.get("type")
    return name if isinstance(name, str) else ""


def tool_text(tool: Dict) -> str:
    """Name and description, as words."""
    function = tool.get("function")
    description = function.get("description") if isinstance(function, Mapping) else None
    return f"{tool_name(tool).replace('_', ' ')} {description if isinstance(description, str) else ''}"


def choice_of(tool_choice: Any) -> Literal["auto", "allowed", "forced"]:
    """Whether the model may choose among all tools, among those that `allowed_tools` lists, or has no choice."""
    if tool_choice is None or tool_choice == "auto":
        return "auto"
    return "allowed" if allowed_names(tool_choice) is not None else "forced"


def allowed_names(tool_choice: Any) -> frozenset[str] | None:
    """The names of an `allowed_tools` choice of mode auto; None for any other choice."""
    if not isinstance(tool_choice, Mapping) or tool_choice.get("type") != "allowed_tools":
        return None
    allowed = tool_choice.get("allowed_tools")
    if not isinstance(allowed, Mapping) or allowed.get("mode", "auto") != "auto":
        return None
    tools = allowed.get("tools")
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        return None
    return frozenset(tool_name(tool) for tool in tools if isinstance(tool, Mapping))
