"""The wire form of answers: what handlers return, and what the API's document says of it (openapi.py)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypeAlias

from pydantic import BaseModel
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from server.core import ArtifactState, FinishReason, GateMode
from server.supervisor import State


@dataclass(frozen=True)
class Text:
    """A body that is no JSON, by the media types that it may have."""

    media_types: tuple[str, ...] = ("text/plain",)


@dataclass(frozen=True)
class ByKind:
    """A body whose shape goes with the kind of artifact that the path is about: /v1/admin/KIND/..."""

    shapes: Mapping[str, Any]


@dataclass(frozen=True)
class Told:
    """What a handler answers where it does not fail; metadata of its return type.

    `bodies`: status -> a type, Text, ByKind, or None for no body. `events`: the type of the data of server-sent events that come
    instead of a 200's body. `form`: the fields beside the file of an upload. `headers`: those that these answers always have.
    `asked`: the types of headers that a request may have and that the handler reads itself.
    """

    bodies: Mapping[int, Any]
    events: Any = None
    form: type[BaseModel] | None = None
    headers: tuple[str, ...] = ()
    asked: Mapping[str, Any] = field(default_factory=dict)


class Problem(TypedDict):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(TypedDict):
    """The body of every error on every path, and the event that ends a stream which failed."""

    error: Problem


class Life(TypedDict):
    status: Literal["alive", "engine_dead"]


class Readiness(TypedDict):
    status: State


class VersionAnswer(TypedDict):
    version: str
    git_sha: str
    base: str
    base_fingerprint: str


class ServiceState(TypedDict):
    state: State
    rows_in_flight: int


class BaseMetadata(TypedDict):
    kind: Literal["base"]
    fingerprint: str


class DeltaMetadata(TypedDict):
    kind: Literal["delta"]
    name: str
    version: str
    digest: str
    state: ArtifactState
    nbytes: int
    pinned: bool


class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None
    permission: list[Any]
    metadata: BaseMetadata | DeltaMetadata


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(TypedDict):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    prompt: str


class CachedTokens(TypedDict):
    cached_tokens: int


class UsageAnswer(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Token(TypedDict):
    token: str
    logprob: float | None
    bytes: list[int]


class ChatToken(Token):
    top_logprobs: list[Token]


class ChatLogprobs(TypedDict):
    content: list[ChatToken]


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]
    text_offset: list[int]


class CalledFunction(TypedDict):
    name: str
    arguments: str


class Call(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[Call]]


class FunctionPiece(TypedDict):
    name: NotRequired[str]
    arguments: str


class CallPiece(TypedDict):
    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionPiece


class MessagePiece(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    reasoning_content: str
    tool_calls: list[CallPiece]


class EditedLayer(TypedDict):
    layer: int
    rows: int
    added: int
    removed: int
    rel_norm: float


class SteeringAnswer(TypedDict):
    applied: bool
    reason: str | None
    profile: str | None
    profile_digest: str | None
    direction: str | None
    strength: float | None
    fingerprint: str | None
    positions: NotRequired[list[int]]
    layers: NotRequired[list[EditedLayer]]
    cache_key_scope: Literal["from_edit", "shared"]


class ConflictAnswer(TypedDict):
    score: float | None
    layer: int | None
    auroc: float | None


class Warned(TypedDict):
    code: str
    message: str


class BudgetAnswer(TypedDict):
    limit: int
    used: int


class ProbeUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int


class ToolGateAnswer(TypedDict):
    mode: GateMode
    decision: str
    reason: str
    score: float | None
    threshold: float | None
    policy: str | None
    policy_id: str | None
    placement: str | None
    tool_choice_in: Any
    tool_choice_out: Any
    tools_removed: list[str]
    budget: BudgetAnswer | None
    probe_usage: ProbeUsage
    leak: bool
    explored: bool
    propensity: float
    latency_ms: float
    stage: NotRequired[str | None]
    signals: NotRequired[dict[str, float | None]]
    stopped: NotRequired[bool]
    problem: NotRequired[str | None]


class Timings(TypedDict):
    delta_wait_s: float | None
    ttft_s: float | None
    total_s: float | None


class PartAnswer(TypedDict):
    name: str
    weight: float
    digest: str


class GatewayStart(TypedDict):
    """Of a stream's first chunk, where the request steers or has tools."""

    steering: NotRequired[SteeringAnswer | None]
    conflict: NotRequired[ConflictAnswer | None]
    warnings: NotRequired[list[Warned]]
    tool_gate: NotRequired[ToolGateAnswer | None]


class GatewayAnswer(TypedDict):
    """What was decided on the way."""

    delta: str | None
    delta_digest: str | None
    delta_version: str | None
    deltas: NotRequired[list[PartAnswer]]
    base_fingerprint: str | None
    template_sha256: str | None
    steering: SteeringAnswer | None
    conflict: ConflictAnswer | None
    warnings: list[Warned]
    tool_gate: ToolGateAnswer | None
    timings: Timings


Label: TypeAlias = Literal["applied", "not_applied", "default"]


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    steering: NotRequired[Label | None]


class ChatChunkChoice(TypedDict):
    index: int
    delta: MessagePiece
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    steering: NotRequired[Label | None]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    steering: NotRequired[Label | None]


class CompletionChunkChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    steering: NotRequired[Label | None]


class Envelope(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str | None


class Whole(Envelope):
    usage: UsageAnswer
    gateway: GatewayAnswer


class Chunk(Envelope):
    usage: NotRequired[UsageAnswer | None]
    gateway: NotRequired[GatewayAnswer | GatewayStart]


class ChatCompletion(Whole):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ChatCompletionChunk(Chunk):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class TextCompletion(Whole):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TextCompletionChunk(Chunk):
    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
