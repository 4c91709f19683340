"""The wire form of /tokenize and /detokenize, as vLLM's servers have it."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from server.core import ChatPrompt, Prompt, TextPrompt, ToolUse
from server.message_schema import ChatMessage, check_answers, to_messages
from server.tool_schema import ToolBody, tool_use
from server.wire import WireModel, missing_field, wrong_field

Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(fail_fast=True)]


class TokenizeBody(WireModel):
    """A prompt, or the messages of a chat, which always end with what opens the answer."""

    unserved = ("chat_template", "chat_template_kwargs", "continue_final_message")

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    tools: Annotated[list[ToolBody], Field(fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise missing_field("prompt", "give either prompt or messages")
        if self.add_generation_prompt is False:
            raise wrong_field("add_generation_prompt", "chats are rendered as they are answered, with that prompt")
        if self.messages is not None:
            check_answers(self.messages)
        elif self.tools is not None:
            raise wrong_field("tools", "tools go with messages")
        return self

    def to_prompt(self) -> Prompt:
        if self.messages is None:
            return TextPrompt(self.prompt or "", self.add_special_tokens is not False)
        return ChatPrompt(to_messages(self.messages), special_tokens=bool(self.add_special_tokens))

    def to_tool_use(self) -> ToolUse | None:
        return tool_use(self.tools, None, None)


class DetokenizeBody(WireModel):
    model: str | None = None
    tokens: Ids
