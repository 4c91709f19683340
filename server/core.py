"""The nouns of the request path. Everything imports this module; it imports nothing of ours."""

import time
from dataclasses import dataclass, field
from enum import StrEnum


class GatewayError(Exception):
    """Root of the gateway's own errors: transport-free, and mapped to a status in one table (server/errors.py).

    `param` names the request field at fault; `retry_after_s` is set where trying again soon may help.
    """

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(GatewayError):
    """A field of the request has a value that we cannot accept."""


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class Sampling:
    """How one row is sampled. `temperature` 0 is greedy; `logprobs` counts the alternatives per token, None is off."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    token_id: int
    text: str
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """What one decoding step added to choice `index`: `text` and `token_ids` are the new part only."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class ChatPrompt:
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class TextPrompt:
    text: str


@dataclass(frozen=True)
class TokenPrompt:
    ids: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True)
class GenerationRequest:
    """One call of the gateway. Several prompts (legacy completions) share the permit, the resolved name and the lease.

    `request_id` is ours and unique; the client's x-request-id is only echoed and logged.
    `fill_context` is set when the client named no limit: `sampling.max_tokens` is then our cap, cut to what the
    context leaves.
    """

    request_id: str
    model: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    fill_context: bool = False
    cache_salt: str | None = None


@dataclass
class Decisions:
    """What was decided and measured on the way of one request; filled in by the request path as it goes.

    Not frozen: the response, the log line and the metrics read it also when the path failed half way.
    Durations are seconds; None = not reached.
    """

    started: float = field(default_factory=time.perf_counter)
    delta: str | None = None  # the registered name, or "base"; None until the model is resolved
    system_fingerprint: str | None = None
    delta_digest: str | None = None
    delta_wait_s: float | None = None
    ttft_s: float | None = None
    total_s: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_by_prompt: dict[int, int] = field(default_factory=dict)
    finish_reasons: list[str] = field(default_factory=list)

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, self.completion_tokens, sum(self.cached_by_prompt.values()))
