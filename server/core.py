"""The nouns of the request path. Everything imports this module; it imports nothing of ours."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal


class GatewayError(Exception):
    """Root of the gateway's own errors: transport-free, and mapped to a status in one table (server/errors.py).

    `param` names the request field at fault; `retry_after_s` is set where trying again soon may help.
    """

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(GatewayError):
    """A field of the request has a value that we cannot accept."""


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True)
class Structure:
    """What a text is held to: `rule` is a JSON schema, a regular expression or a grammar in EBNF; a choice has `choices`.

    `field` is where the request says so.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    field: str
    rule: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How one row is sampled. `temperature` 0 is greedy; `logprobs` counts the alternatives per token, None is off.

    `prompt_logprobs` does so for the prompt's tokens. `logit_bias`: pairs of a token id and what is added to its logit.
    Special tokens are part of the text where they are not skipped. Of the rows that wait for the engine those of the lowest
    `priority` go first, where it heeds that.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    structure: Structure | None = None
    skip_special_tokens: bool = True
    priority: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """`logprob` None = it has none, as the first token of a prompt."""

    token_id: int
    text: str
    logprob: float | None
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True)
class CallDelta:
    """A piece of call `index` of a choice. The first piece alone has id and name; all `arguments` together are JSON."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True)
class RowTimes:
    """When the engine took a row into its queue and into its batch, and had its first token: seconds of `time.monotonic`."""

    queued: float
    scheduled: float
    first_token: float


@dataclass(frozen=True)
class TokenEvent:
    """What one decoding step added to choice `index`: `text` and `token_ids` are the new part only.

    Where tool calls are read, they and the reasoning are apart from the text, which may lag behind the tokens.
    `prompt_logprobs` come with a choice's first event, from the prompt's second token on.
    `times` come with a choice's first event, where the engine tells them.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    times: RowTimes | None = None


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters` is a JSON schema of an object; None = it takes none."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


@dataclass(frozen=True)
class ToolUse:
    """What a request says about tools. `named` is the one that must be called, of choice "named".

    `watched`: the choice is "none", and calls that the model writes all the same are read out of its text.
    """

    tools: tuple[Tool, ...]
    choice: Literal["auto", "none", "required", "named"] = "auto"
    named: str | None = None
    parallel: bool = True
    watched: bool = False


GateMode = Literal["off", "observe", "enforce"]
# Where an uploaded artifact is; failed: it cannot be loaded as it is.
ArtifactState = Literal["stored", "packed", "loading", "resident", "failed"]


@dataclass(frozen=True)
class ToolGateAsk:
    """What a request says about the tool gate. None: as the server or the policy has it; `policy` is a name."""

    mode: GateMode | None = None
    threshold: float | None = None
    budget: int | None = None
    explain: bool = False
    policy: str | None = None
    allow_require: bool = False


@dataclass(frozen=True)
class PastCall:
    """A call in the history; `arguments` is decoded JSON, which is what chat templates expect."""

    id: str
    name: str
    arguments: Any


@dataclass(frozen=True)
class Message:
    """One turn. Assistants may have called; a "tool" message answers call `tool_call_id` of the tool `name`."""

    role: str
    content: str
    calls: tuple[PastCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class ChatPrompt:
    """`tools` are those that the prompt shows. `special_tokens`: the tokenizer's own go around what the template writes."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    special_tokens: bool = False


@dataclass(frozen=True)
class TextPrompt:
    text: str
    special_tokens: bool = True


@dataclass(frozen=True)
class TokenPrompt:
    ids: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True)
class Window:
    """Positions start..end, end excluded; None = to the end. Below zero counts from the prompt's end."""

    start: int
    end: int | None


# Of a prompt: its last token, all of it, single positions (below zero: from its end), or a window.
PromptPositions = Literal["last", "all"] | tuple[int, ...] | Window | None
# Of what is generated; step 0 is the first generated token's own position.
GenerationSteps = Literal["all"] | Window | None


@dataclass(frozen=True)
class ProfileSteering:
    """Steer by a profile. `field` is where the request says so; None = what the profile was fitted for."""

    field: str
    profile: str
    direction: str
    strength: float | None = None
    mode: Literal["targets", "delta"] = "targets"
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class OfMax:
    """A value as a multiple of the largest activation that the SAE records of the latent."""

    factor: float


@dataclass(frozen=True)
class FeatureEdit:
    id: int
    op: str
    value: float | OfMax


@dataclass(frozen=True)
class SAEEdit:
    sae: str
    features: tuple[FeatureEdit, ...]


@dataclass(frozen=True)
class FeatureSteering:
    """Edit latents of SAEs, all at the same positions."""

    edits: tuple[SAEEdit, ...]
    prompt: PromptPositions
    generation: GenerationSteps


@dataclass(frozen=True)
class ConflictCheck:
    """Score the conflict between prompt and memory by a profile's probe; steer by `then` where it is `at_least`."""

    score: bool
    profile: str | None
    at_least: float | None = None
    then: ProfileSteering | None = None


@dataclass(frozen=True)
class SteeringOptions:
    """How an edit is served, whatever it is.

    `best_effort`: where it cannot be made, the plain answer goes out and says so. `compare`: the prompt is answered twice, edited
    and plainly. `report`: the answer shows positions and layers.
    """

    best_effort: bool = False
    compare: bool = False
    report: bool = True


@dataclass(frozen=True)
class DeltaPart:
    """One delta of a combination, by name; `digest` "" until the name is resolved."""

    name: str
    weight: float
    digest: str = ""


@dataclass(frozen=True)
class GenerationRequest:
    """One call of the gateway. Several prompts (legacy completions) share the permit, the resolved name and the lease.

    `request_id` is ours and unique; the client's x-request-id is only echoed and logged.
    `fill_context` is set when the client named no limit: `sampling.max_tokens` is then our cap, cut to what the
    context leaves. `opt_out` is set when the client said that it wants no steering, rather than nothing about it.
    `echo` "prompt" is an answer that is the prompt alone; the token that the engine makes on the way is not sent.
    """

    request_id: str
    model: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    fill_context: bool = False
    cache_salt: str | None = None
    steering: ProfileSteering | FeatureSteering | None = None
    conflict: ConflictCheck | None = None
    tools: ToolUse | None = None
    tool_gate: ToolGateAsk = ToolGateAsk()
    options: SteeringOptions = SteeringOptions()
    opt_out: bool = False
    echo: Literal["prompt", "both"] | None = None
    combine: tuple[
        DeltaPart, ...
    ] = ()  # deltas that are served as their weighted sum, beside `model`, which is the base

    @property
    def rows(self) -> int:
        """How many answers are generated."""
        return len(self.prompts) * self.sampling.n * (2 if self.options.compare else 1)
