"""The wire form of `messages`: turns, calls in the history, and what tools answered."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from server.core import Message, PastCall
from server.parameters import MAX_DEPTH, too_deep
from server.wire import WireModel, missing_field, wrong_field


class TextPart(WireModel):
    type: Literal["text"]
    text: str


class PastFunction(WireModel):
    name: str
    arguments: str


class PastCallBody(WireModel):
    id: str
    type: Literal["function"] = "function"
    function: PastFunction

    def to_call(self) -> PastCall:
        # Clients send "" for a call without arguments.
        return PastCall(self.id, self.function.name, json.loads(self.function.arguments or "{}"))


def _problem_of(arguments: str) -> str | None:
    try:
        deep = too_deep(json.loads(arguments or "{}"))
    except ValueError:
        return "arguments is a JSON text"
    except RecursionError:
        deep = True
    return f"arguments is nested more than {MAX_DEPTH} levels deep" if deep else None


class ChatMessage(WireModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[PastCallBody], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        calls = self.tool_calls or ()
        if calls and self.role != "assistant":
            raise wrong_field("tool_calls", "only an assistant calls tools")
        if self.content is None and not calls:
            raise missing_field("content", f"a message of role {self.role!r} needs content")
        if self.role == "tool" and self.tool_call_id is None:
            raise missing_field("tool_call_id", "a tool message says which call it answers")
        for position, call in enumerate(calls):
            if problem := _problem_of(call.function.arguments):
                raise wrong_field(f"tool_calls.{position}.function.arguments", problem)
        if len({call.id for call in calls}) < len(calls):
            raise wrong_field("tool_calls", "two calls of one message have the same id")
        return self

    def to_message(self, names: dict[str, str]) -> Message:
        """`names` are those of the tools that were called, by the id of the call."""
        parts: Any = (
            [self.content or ""] if not isinstance(self.content, list) else [part.text for part in self.content]
        )
        # OpenAI's newer name for the same thing; chat templates only know the older one.
        role = "system" if self.role == "developer" else self.role
        calls = tuple(call.to_call() for call in self.tool_calls or ())
        if self.role != "tool":
            return Message(role, "".join(parts), calls)
        return Message(role, "".join(parts), (), self.tool_call_id, names.get(self.tool_call_id or ""))


def check_answers(messages: Sequence[ChatMessage]) -> None:
    """Every tool message answers a call of an assistant's message before it. Raises the complaints of wire.py."""
    called: set[str] = set()
    for position, message in enumerate(messages):
        called |= {call.id for call in message.tool_calls or ()}
        if message.role == "tool" and message.tool_call_id not in called:
            raise wrong_field(
                f"messages.{position}.tool_call_id",
                f"no assistant's message before this one has a call of the id {message.tool_call_id!r:.80}",
            )


def to_messages(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    names: dict[str, str] = {}
    found = []
    for message in messages:
        names |= {call.id: call.function.name for call in message.tool_calls or ()}
        found.append(message.to_message(names))
    return tuple(found)
