"""The OpenAI wire models: a JSON body -> a checked request -> GenerationRequest.

Strict about types (no "5" for 5, no true for 1), tolerant of fields that OpenAI may add: those are ignored. Known ones
that would change the answer and that we do not do are refused rather than ignored.
"""

from dataclasses import replace
from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from server.core import (
    ChatPrompt,
    GenerationRequest,
    Prompt,
    Sampling,
    SteeringOptions,
    TextPrompt,
    TokenPrompt,
    ToolUse,
)
from server.delta_schema import CombinationBody
from server.message_schema import ChatMessage, check_answers, to_messages
from server.steering_schema import ConflictBody, SteeringBody
from server.tool_gate_schema import ToolGateBody
from server.tool_schema import ToolBody, tool_use
from server.wire import WireModel, unsupported, wrong_field

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_LOGPROBS = 20
_INT64 = 1 << 63


class StreamOptions(WireModel):
    include_usage: bool | None = None


class SamplingFields(WireModel):
    """What both generation endpoints share. null means the default everywhere, as OpenAI clients expect."""

    model: str
    max_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]
        | None
    ) = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=_INT64)] | None = None
    ignore_eos: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, Any] | None = None
    steering: SteeringBody | None = None
    conflict: ConflictBody | None = None
    delta: CombinationBody | None = None
    extra_body: Any = None  # clients unpack it before they send; what arrives packed would be ignored in silence

    @model_validator(mode="after")
    def _refuse_what_we_do_not_do(self) -> Self:
        if self.logit_bias:
            raise unsupported("logit_bias")
        if self.extra_body is not None:
            raise unsupported("extra_body")
        if self.steering is not None and self.conflict is not None and self.conflict.policy is not None:
            raise wrong_field("conflict.policy", "steering and conflict.policy both choose an edit; give one of them")
        if self.compares and self.n not in (None, 1):
            raise wrong_field("n", "steering.compare gives two choices, steered and default; it needs n = 1")
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options is only allowed when stream is true")
        return self

    @property
    def compares(self) -> bool:
        return self.steering is not None and bool(self.steering.compare)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def _request(
        self, request_id: str, prompts: tuple[Prompt, ...], limit: int | None, logprobs: int | None, default_limit: int
    ) -> GenerationRequest:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        sampling = Sampling(
            max_tokens=limit or default_limit,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            seed=self.seed,
            stop=stop,
            logprobs=logprobs,
            n=self.n or 1,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
        )
        return GenerationRequest(
            request_id,
            self.model,
            prompts,
            sampling,
            fill_context=limit is None,
            cache_salt=self.cache_salt,
            steering=self.steering.to_steering() if self.steering else None,
            conflict=self.conflict.to_check() if self.conflict else None,
            options=self.steering.to_options() if self.steering else SteeringOptions(),
            opt_out=self.steering is None and "steering" in self.model_fields_set,
            combine=self.delta.to_parts() if self.delta else (),
        )


class ResponseFormat(WireModel):
    type: str


class ChatRequest(SamplingFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[ToolBody] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    tool_gate: ToolGateBody | None = None
    functions: list[Any] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.functions:
            raise unsupported("functions")
        check_answers(self.messages)
        self._tool_use()
        if self.response_format is not None and self.response_format.type != "text":
            raise unsupported("response_format")
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs to be true")
        return self

    def to_request(self, request_id: str, default_max_tokens: int) -> GenerationRequest:
        prompt = ChatPrompt(to_messages(self.messages))
        limit = self.max_completion_tokens or self.max_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        request = self._request(request_id, (prompt,), limit, logprobs, default_max_tokens)
        gate = self.tool_gate or ToolGateBody()
        return replace(request, tools=self._tool_use(), tool_gate=gate.to_ask())

    def _tool_use(self) -> ToolUse | None:
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]


class CompletionRequest(SamplingFields):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        for field in ("echo", "suffix"):
            if getattr(self, field):
                raise unsupported(field)
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise unsupported("best_of")
        if self.compares and len(self.prompts()) != 1:
            raise wrong_field("prompt", "steering.compare gives two choices, steered and default; it needs one prompt")
        return self

    def prompts(self) -> tuple[Prompt, ...]:
        if isinstance(self.prompt, str):
            return (TextPrompt(self.prompt),)
        if isinstance(self.prompt[0], int):
            return (TokenPrompt(tuple(token for token in self.prompt if isinstance(token, int))),)
        return tuple(
            TextPrompt(one) if isinstance(one, str) else TokenPrompt(tuple(one))
            for one in self.prompt
            if not isinstance(one, int)
        )

    def to_request(self, request_id: str, default_max_tokens: int) -> GenerationRequest:
        return self._request(request_id, self.prompts(), self.max_tokens, self.logprobs, default_max_tokens)
