"""What was decided and measured on the way of one request: the one object that response, log line and metrics read."""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from server.core import DeltaPart, GateMode, RowTimes, Sampling, Usage
from server.engine.base import LayerReport
from steering.toolgate import Decision

SteeringMode = Literal["profile", "features", "policy", "default", "score"]
# rejected: the request's fault; failed: ours, or not reached; unavailable: ours, and the client takes a plain answer;
# no_op: nothing to edit; unmet: the policy's condition.
SteeringOutcome = Literal["rejected", "failed", "unavailable", "no_op", "scored", "unmet", "not_reached", "applied"]

# How far a generation request is.
Phase = Literal["queued", "loading_delta", "prefill", "decode"]
# Where a request finds its delta: in execution form, packed in RAM, or on the disk only.
Swap = Literal["hot", "warm", "cold"]


@dataclass(frozen=True)
class Warning:
    """What a client should know about an answer that is given all the same."""

    code: str
    message: str


@dataclass
class Steered:
    """What was asked of steering and what the worker reported of the first prompt. Not frozen, as `Decisions`.

    `features` counts latents of all tables; `edited_rows` those of all prompts. `reason` says why nothing was edited.
    """

    mode: SteeringMode
    outcome: SteeringOutcome = "rejected"
    profile: str | None = None
    profile_digest: str | None = None
    direction: str | None = None
    strength: float | None = None
    fingerprint: str | None = None
    features: int = 0
    reason: str | None = None
    positions: tuple[int, ...] = ()
    layers: tuple[LayerReport, ...] = ()
    edited_rows: int = 0
    score: float | None = None
    probe_layer: int | None = None
    probe_auroc: float | None = None
    overhead_s: float = 0.0  # the gateway's own share: plan, room for the edit, report
    compare: bool = False  # a second choice is the plain answer
    report: bool = True  # positions and layers are shown

    @property
    def applied(self) -> bool:
        return self.outcome == "applied"

    def choice_label(self, index: int) -> str | None:
        """Of a comparison's choices: edited or not. None = not known yet, as of an edit of generated positions only."""
        if index:
            return "default"
        if self.outcome == "failed":
            return None
        return "applied" if self.applied else "not_applied"


@dataclass
class ToolCalls:
    """What was asked of tools, and what the answers held. Not frozen, as `Decisions`.

    `parsed` counts calls, of all choices; `malformed` answers in which something looks like a call and is none;
    `suppressed` calls that were read and that the tool gate kept back.
    """

    choice: str
    offered: int
    parsed: int = 0
    malformed: int = 0
    suppressed: int = 0

    def suppress(self, calls: int) -> None:
        """These of the calls read so far are not in the answer."""
        self.parsed -= calls
        self.suppressed += calls


@dataclass
class Gated:
    """What the tool gate made of a request with tools, and what that took. Not frozen, as `Decisions`.

    `choice_in` and `choice_out` are OpenAI's `tool_choice`, as it came and as the answer was generated with; None = no tools.
    The tokens are those that the gate alone cost: of probes, and of answers that were not sent. `logged`: the log may tell
    what the decision came from.
    """

    mode: GateMode
    choice_in: Any
    choice_out: Any
    explain: bool
    logged: bool
    policy: str | None = None
    placement: str | None = None
    decision: Decision | None = None  # None until it is made
    prompt_tokens: int = 0
    completion_tokens: int = 0
    leak: bool = False
    latency_s: float = 0.0


@dataclass
class Pace:
    """The tokens of one choice: when the first and the last came, seconds of `time.perf_counter`, and how many."""

    first: float
    last: float
    tokens: int = 0


@dataclass
class Decisions:
    """Filled in by the request path as it goes.

    Not frozen: the response, the log line and the metrics read it also when the path failed half way.
    Durations are seconds; None = not reached.
    """

    started: float = field(default_factory=time.perf_counter)
    model: str = ""  # as the request names it
    sampling: Sampling | None = None
    delta: str | None = None  # the registered name, "base" or "combined"; None until the model is resolved
    parts: tuple[DeltaPart, ...] = ()  # of a combination
    system_fingerprint: str | None = None
    delta_digest: str | None = None
    delta_version: str | None = None  # behind the @ of a name that goes on meaning this
    base_fingerprint: str | None = None
    template_sha256: str | None = None  # of the template that renders the request; None for a prompt of plain text
    phase: Phase = "queued"  # the last one that was reached
    swap: Swap | None = None  # None of the base
    queue_s: float | None = None  # waiting for its turn, and in the engine's queue
    delta_wait_s: float | None = None
    steps: dict[str, tuple[float, float]] = field(default_factory=dict)  # when they began and ended, as `started`
    row_times: RowTimes | None = None  # of the first row
    pace: dict[int, Pace] = field(default_factory=dict)  # by choice
    ttft_s: float | None = None
    total_s: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_by_prompt: dict[int, int] = field(default_factory=dict)
    finish_reasons: list[str] = field(default_factory=list)
    steered: Steered | None = None
    tool_calls: ToolCalls | None = None
    gated: Gated | None = None
    warnings: list[Warning] = field(default_factory=list)

    def answer_plainly(self, reason: str) -> None:
        """The edit cannot be made and the client takes the plain answer: it, the log line and the metrics say so."""
        steered = self.steered
        assert steered is not None  # the planner has filled it in
        steered.outcome, steered.reason, steered.fingerprint = "unavailable", reason, None
        steered.positions, steered.layers, steered.score = (
            (),
            (),
            None,
        )  # of other prompts, whose edits are given up too
        self.warnings = [Warning("not_steered", f"this is the plain answer: {reason}")]  # others are about the edit
        if steered.probe_layer is not None:
            self.warnings.append(Warning("not_scored", "the conflict is not scored: the score is part of the edit"))

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, self.completion_tokens, sum(self.cached_by_prompt.values()))

    def took(self, step: str, began: float) -> None:
        """A step that began then has ended now."""
        self.steps[step] = (began, time.perf_counter())

    @property
    def kind(self) -> str:
        return "delta" if self.delta_digest else "base"

    @property
    def decode_s(self) -> float | None:
        """From the first token to the last, of all choices."""
        if not self.pace:
            return None
        return max(pace.last for pace in self.pace.values()) - min(pace.first for pace in self.pace.values())
