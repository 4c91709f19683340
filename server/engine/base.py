"""The engine as the gateway sees it. One real engine exists (vllm.py); the tests use a fake."""

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client import Metric

from server.core import Sampling, TokenEvent


class EngineError(Exception):
    """The engine failed on one request."""


class EngineDeadError(EngineError):
    """The engine's process is gone, and with it all that was loaded. `retry_after_s` is set where it will be back."""

    def __init__(self, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineLoadError(EngineError):
    """A delta or an edit could not be made resident. `retry_after_s` is set where it will not be tried again before."""

    def __init__(self, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SamplingError(EngineError):
    """The engine does not take a value of the request's sampling; raised before the first event. `param` is the field."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class GrammarError(SamplingError):
    """The engine cannot hold a text to the structure that was asked for."""


class EditUnavailableError(EngineError):
    """This engine cannot edit activations: its model has no decoder layers that we can hook."""


@dataclass(frozen=True)
class EngineDelta:
    """A delta as the engine knows it: the digest is the only identity, the path a local file of the artifact.

    `chat_template` is the fine-tune's where it has one of its own; `stop_ids` are its end tokens, in place of the base's, or beside
    them where `base_stops`; `added_tokens` lie behind the base's vocabulary. `tokenizer` names its own, "" = the base's. A
    combination has `parts` in place of a path: it is their weighted sum.
    """

    digest: str
    path: str
    chat_template: str = field(default="", compare=False)
    stop_ids: tuple[int, ...] = field(default=(), compare=False)
    base_stops: bool = field(default=False, compare=False)
    added_tokens: int = field(default=0, compare=False)
    tokenizer: str = field(default="", compare=False)
    parts: tuple["WeightedDelta", ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class WeightedDelta:
    """One delta of a combination."""

    delta: EngineDelta
    weight: float


@dataclass(frozen=True)
class EngineEdit:
    """An edit of activations as the engine knows it.

    `spec` is canonical JSON: tables, positions, probe and condition, with local paths of the artifacts.
    `fingerprint` is the SHA-256 (hex) of the spec without its paths and the edit's only identity.
    """

    fingerprint: str
    spec: str


@dataclass(frozen=True)
class LayerReport:
    """What an edit did on one layer, all its rows together: counts of latents, and ||delta|| / ||h|| as the rows' mean."""

    layer: int
    rows: int
    raised: int
    lowered: int
    rel_norm: float


@dataclass(frozen=True)
class EditReport:
    """What the worker really did for one request: absolute positions edited so far, per layer, and the probe's score."""

    positions: tuple[int, ...]
    layers: tuple[LayerReport, ...]
    score: float | None
    applied: bool


@dataclass(frozen=True)
class EngineStep:
    """One step of the engine, as it says itself. Deltas are digests, with their rows; the base's rows are all others.

    `batch`: rows that got a token. `lookups` and `hits` are tokens of prompts that the prefix cache was asked for, and had;
    these and `preemptions` are what the step added.
    """

    running: int = 0
    waiting: int = 0
    batch: int = 0
    kv_usage: float = 0.0
    lookups: int = 0
    hits: int = 0
    preemptions: int = 0
    running_deltas: Mapping[str, int] = field(default_factory=dict)
    waiting_deltas: Mapping[str, int] = field(default_factory=dict)


class Engine(Protocol):
    async def start(self) -> None:
        """Load the base model, also after a `stop`; returns when the first request can be answered. Raises EngineError."""
        ...

    async def stop(self) -> None:
        """End every process of the engine; safe to call when start failed or never ran."""
        ...

    @property
    def max_model_len(self) -> int:
        """Prompt and completion tokens together; known from the first start on."""
        ...

    @property
    def dead(self) -> bool:
        """Whether the engine ended by itself; never blocks."""
        ...

    @property
    def busy(self) -> bool:
        """Whether it owes something: rows that it has not finished, or the answer to a call; never blocks."""
        ...

    @property
    def signs(self) -> int:
        """Signs of life so far: a number that grows with every step, and every call that is answered; never blocks."""
        ...

    def kill(self) -> None:
        """End its processes at once, whatever they do; it is dead a moment later."""
        ...

    @property
    def dtype(self) -> str:
        """Of the weights; "" until start."""
        ...

    def watch(self, observe: Callable[[EngineStep], None]) -> None:
        """Tell `observe` of every step. Call it before `start`."""
        ...

    def own_metrics(self) -> Iterable[Metric]:
        """The engine's own metrics, by its own names."""
        ...

    def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        delta: EngineDelta | None,
        cache_salt: str | None,
        edit: EngineEdit | None = None,
    ) -> AsyncGenerator[TokenEvent, None]:
        """Stream the `sampling.n` choices of one prompt; closing the iterator aborts the rows. `edit` must be loaded.

        Raises SamplingError before the first event, EngineError.
        """
        ...

    async def measure(self, delta: EngineDelta) -> int:
        """Bytes that the delta will take in execution form, or somewhat more. Raises EngineLoadError."""
        ...

    async def load(self, delta: EngineDelta) -> int:
        """Make a delta resident and return its resident bytes; a combination's parts must be. `path` may be any copy of its file.

        Raises EngineLoadError.
        """
        ...

    async def unload(self, delta: EngineDelta) -> None: ...

    async def load_edit(self, edit: EngineEdit) -> None:
        """Make an edit resident. Raises EngineLoadError, or EditUnavailableError where no edit can work."""
        ...

    async def unload_edit(self, edit: EngineEdit) -> None: ...

    async def edit_report(self, request_id: str) -> EditReport | None:
        """What the worker did for a request so far, from its own counters; known from the first event on, and told once."""
        ...
