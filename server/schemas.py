"""The OpenAI wire models: a JSON body -> a checked request -> GenerationRequest.

Strict about types (no "5" for 5, no true for 1), tolerant of fields that OpenAI may add: those are ignored. Known ones
that would change the answer and that we do not do, OpenAI's or vLLM's, are refused rather than ignored.
"""

from dataclasses import replace
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from server.core import (
    ChatPrompt,
    GenerationRequest,
    Prompt,
    Sampling,
    SteeringOptions,
    Structure,
    TextPrompt,
    TokenPrompt,
    ToolUse,
)
from server.delta_schema import CombinationBody
from server.message_schema import ChatMessage, check_answers, to_messages
from server.replies import StreamedUsage
from server.steering_schema import ConflictBody, SteeringBody
from server.structure_schema import ResponseFormat, StructuredOutputs
from server.tool_gate_schema import ToolGateBody
from server.tool_schema import ToolBody, tool_use
from server.wire import WireModel, unsupported, wrong_field

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BIAS = 100
_INT64 = 1 << 63
_UNSERVED = (
    *("allowed_token_ids", "bad_words", "chat_template", "continue_final_message", "documents", "extra_body"),
    *("guided_choice", "guided_grammar", "guided_json", "guided_regex", "include_stop_str_in_output", "prompt_embeds"),
    *("prompt_logprobs", "repetition_detection", "suffix", "truncate_prompt_tokens", "use_beam_search"),
)


class StreamOptions(WireModel):
    """`continuous_usage_stats`: every chunk carries the usage so far."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


def _biases(value: object) -> dict[int, float]:
    """JSON's keys are text; those of biases are token ids."""
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise PydanticCustomError("logit_bias", f"give an object of at most {MAX_BIASES} token ids and their biases")
    found: dict[int, float] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10):
            raise PydanticCustomError("logit_bias", "{key} is no token id", {"key": repr(key)[:40]})
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise PydanticCustomError("logit_bias", f"a bias is a number from -{MAX_BIAS} to {MAX_BIAS}")
        if int(key) in found:
            raise PydanticCustomError("logit_bias", "token {key} is given twice", {"key": int(key)})
        found[int(key)] = float(bias)
    return found


_BIASES = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
    "maxProperties": MAX_BIASES,
}
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
StopString = Annotated[str, Field(min_length=1)]


class SamplingFields(WireModel):
    """What both generation endpoints share. null means the default everywhere, as OpenAI clients expect."""

    unserved = _UNSERVED
    model: str
    max_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256, fail_fast=True)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_biases), WithJsonSchema(_BIASES)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=_INT64)] | None = None
    ignore_eos: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    priority: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")] | None = None
    add_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    steering: SteeringBody | None = None
    conflict: ConflictBody | None = None
    delta: CombinationBody | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.response_format is not None and self.structured_outputs is not None:
            raise wrong_field("structured_outputs", "response_format says what the text is held to; give one of them")
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
    def streamed_usage(self) -> StreamedUsage:
        options = self.stream_options or StreamOptions()
        return StreamedUsage(bool(options.include_usage), bool(options.continuous_usage_stats))

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
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=tuple((self.logit_bias or {}).items()),
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            structure=self._structure(),
            priority=self.priority or 0,
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

    def _structure(self) -> Structure | None:
        given = self.structured_outputs or self.response_format
        return given.to_structure() if given else None


class ChatRequest(SamplingFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[ToolBody], Field(fail_fast=True)] | None = None
    tool_choice: Annotated[Any, WithJsonSchema({"type": ["string", "object", "null"]})] = None
    parallel_tool_calls: bool | None = None
    tool_gate: ToolGateBody | None = None
    functions: list[Any] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.functions:
            raise unsupported("functions")
        check_answers(self.messages)
        self._tool_use()
        structure = self._structure()
        if structure is not None and self.tools and self.tool_choice != "none":
            raise wrong_field(structure.field, f'{structure.field} holds calls to it too; give tool_choice "none"')
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs to be true")
        return self

    def to_request(self, request_id: str, default_max_tokens: int) -> GenerationRequest:
        prompt = ChatPrompt(to_messages(self.messages), special_tokens=bool(self.add_special_tokens))
        limit = self.max_completion_tokens or self.max_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        request = self._request(request_id, (prompt,), limit, logprobs, default_max_tokens)
        gate = self.tool_gate or ToolGateBody()
        return replace(request, tools=self._tool_use(), tool_gate=gate.to_ask())

    def _tool_use(self) -> ToolUse | None:
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)


TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class CompletionRequest(SamplingFields):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=_INT64)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise wrong_field("max_tokens", "an answer of no tokens is only there for echo")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise unsupported("best_of")
        if self.compares and len(self.prompts()) != 1:
            raise wrong_field("prompt", "steering.compare gives two choices, steered and default; it needs one prompt")
        return self

    def prompts(self) -> tuple[Prompt, ...]:
        special = self.add_special_tokens is not False
        if isinstance(self.prompt, str):
            return (TextPrompt(self.prompt, special),)
        if isinstance(self.prompt[0], int):
            return (TokenPrompt(tuple(token for token in self.prompt if isinstance(token, int))),)
        return tuple(
            TextPrompt(one, special) if isinstance(one, str) else TokenPrompt(tuple(one))
            for one in self.prompt
            if not isinstance(one, int)
        )

    def to_request(self, request_id: str, default_max_tokens: int) -> GenerationRequest:
        limit = 1 if self.max_tokens == 0 else self.max_tokens
        request = self._request(request_id, self.prompts(), limit, self.logprobs, default_max_tokens)
        if not self.echo:
            return request
        sampling = replace(request.sampling, prompt_logprobs=self.logprobs)
        return replace(request, sampling=sampling, echo="prompt" if self.max_tokens == 0 else "both")
