"""What the tools of a request mean: which of them the prompt shows, what the engine is held to, how the answer is read."""

import json
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from server.core import (
    CallDelta,
    ChatPrompt,
    FinishReason,
    InvalidRequest,
    Prompt,
    Sampling,
    Structure,
    TokenEvent,
    Tool,
    ToolUse,
)
from server.decisions import Decisions, ToolCalls
from server.engine.base import GrammarError
from server.toolcalls import PARSERS
from server.toolcalls.deltas import Call, Content, MoreArguments, Parser, Reasoning
from server.toolcalls.forced import Named, Required

# Their marks can be special tokens, which would otherwise be taken out of the text.
_MARKED = ("hermes", "toolrl")


class Toolbox:
    """The settings of the section `tools`, applied to requests; `use` is None where a request has no tools."""

    def __init__(self, parser: str, exclude_when_none: bool, drop_unknown: bool, max_tools: int) -> None:
        self._parser = parser
        self._exclude_when_none = exclude_when_none
        self._drop_unknown = drop_unknown
        self._max_tools = max_tools

    def check(self, use: ToolUse | None) -> None:
        """Raises InvalidRequest."""
        if use and len(use.tools) > self._max_tools:
            raise InvalidRequest(
                f"{len(use.tools)} tools are more than the {self._max_tools} that this server takes (tools.max_tools)",
                param="tools",
            )

    def show(self, prompt: Prompt, use: ToolUse | None) -> Prompt:
        """The prompt with the tools that the model is to see."""
        if use is None or not isinstance(prompt, ChatPrompt) or (use.choice == "none" and self._exclude_when_none):
            return prompt
        return replace(prompt, tools=use.tools)

    def constrain(self, sampling: Sampling, use: ToolUse | None) -> Sampling:
        """A choice that forces calls is a JSON schema for the engine, as vLLM's server makes it."""
        if use is None or (use.choice == "none" and not use.watched):
            return sampling
        if use.choice in ("auto", "none"):
            return replace(sampling, skip_special_tokens=self._parser not in _MARKED)
        named = [named_schema(tool) for tool in use.tools if tool.name == use.named]
        schema = named[0] if named else required_schema(use.tools, use.parallel)
        return replace(sampling, structure=Structure("json_schema", "tools", json.dumps(schema)))

    def read(
        self, events: AsyncGenerator[TokenEvent, None], use: ToolUse | None, decisions: Decisions
    ) -> AsyncGenerator[TokenEvent, None]:
        """The same events with the calls taken out of their text, one for one: late is only text that is held back."""
        if use is None:
            return events
        counted = decisions.tool_calls = decisions.tool_calls or ToolCalls(use.choice, len(use.tools))
        return events if use.choice == "none" and not use.watched else self._read(events, use, counted)

    async def _read(
        self, events: AsyncGenerator[TokenEvent, None], use: ToolUse, counted: ToolCalls
    ) -> AsyncGenerator[TokenEvent, None]:
        choices: dict[int, _Choice] = {}
        try:
            async with aclosing(events):
                async for event in events:
                    if event.index not in choices:
                        choices[event.index] = _Choice(self._reader(use), use, self._drop_unknown)
                    yield choices[event.index].read(event, counted)
        except GrammarError as error:
            if error.param != "tools":
                raise
            raise InvalidRequest(f"the tools' parameters cannot be enforced: {error}", param="tools") from error

    def _reader(self, use: ToolUse) -> Parser:
        if use.named is not None:
            return Named(use.named)
        return Required() if use.choice == "required" else PARSERS[self._parser]()


class _Choice:
    """One choice of an answer while it is read; gives calls their numbers and ids."""

    def __init__(self, parser: Parser, use: ToolUse, drop_unknown: bool) -> None:
        self._parser = parser
        self._use = use
        self._known = {tool.name for tool in use.tools} if drop_unknown else None
        self._calls = 0

    def read(self, event: TokenEvent, counted: ToolCalls) -> TokenEvent:
        deltas = self._parser.feed(event.text)
        if event.finish_reason is not None:
            deltas += self._parser.finish()
        text, reasoning = "", ""
        calls: list[CallDelta] = []
        for delta in deltas:
            match delta:
                case Content():
                    text += delta.text
                case Reasoning():
                    reasoning += delta.text
                case MoreArguments():
                    calls.append(CallDelta(self._calls - 1, None, None, delta.text))
                case Call() if self._known is not None and delta.name not in self._known:
                    text += delta.source
                case Call() if self._use.parallel or not self._calls:
                    calls.append(self._number(delta))
        reason = self._end(event.finish_reason, counted)
        return replace(event, text=text, reasoning=reasoning, calls=tuple(calls), finish_reason=reason)

    def _number(self, call: Call) -> CallDelta:
        self._calls += 1
        # JSON can spell half a surrogate pair, UTF-8 cannot: it goes out as the escape that it came from.
        name, arguments = (text.encode(errors="backslashreplace").decode() for text in (call.name, call.arguments))
        return CallDelta(self._calls - 1, f"call_{secrets.token_hex(12)}", name, arguments)

    def _end(self, reason: FinishReason | None, counted: ToolCalls) -> FinishReason | None:
        """The reason as OpenAI has it: an answer that calls ends with the calls, one that had to call a function does not."""
        if reason is None:
            return None
        counted.malformed += self._parser.malformed
        if self._use.choice == "named":
            counted.parsed += self._calls if not self._parser.malformed else 0
            return reason
        counted.parsed += self._calls
        return FinishReason.TOOL_CALLS if reason is FinishReason.STOP and self._calls else reason


def required_schema(tools: Sequence[Tool], parallel: bool) -> dict[str, Any]:
    """An array of calls, each of a name and that tool's parameters.

    Every tool's own schema stands under $defs by the tool's name, and its references are moved there with it.
    """
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "parameters": {"$ref": f"#/$defs/{tool.name}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schemas = {tool.name: _moved(_parameters(tool), f"#/$defs/{tool.name}") for tool in tools}
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": schemas}
    return schema if parallel else {**schema, "maxItems": 1}


def named_schema(tool: Tool) -> dict[str, Any]:
    """Just the arguments: the name is known."""
    return _parameters(tool)


def _parameters(tool: Tool) -> dict[str, Any]:
    return {"type": "object", **(tool.parameters or {"properties": {}})}


def _moved(schema: Any, base: str) -> Any:
    """A copy of a schema whose references hold where its root is `base`."""
    if isinstance(schema, list):
        return [_moved(part, base) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: base + value[1:] if key == "$ref" and isinstance(value, str) else _moved(value, base)
        for key, value in schema.items()
    }
