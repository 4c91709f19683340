"""One HTTP exchange as log line and metrics see it, and all metrics of the gateway in one registry."""

import platform
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Info,
    Metric,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from server.admission import Allowance
from server.decisions import Decisions
from server.gate_report import GateMetrics
from server.keys import ANYBODY, Caller
from server.metrics.compat import CompatCollector
from server.metrics.engine import EngineMetrics
from server.metrics.generation import GenerationMetrics
from server.metrics.http import CLIENT_GONE, HTTPMetrics
from server.metrics.labels import DeltaLabels
from server.metrics.residency import DeltaMetrics, ResidencyMetrics
from server.metrics.steering import SteeringMetrics
from server.metrics.uploads import UploadMetrics
from server.tracing import TraceContext, Tracing

KINDS = ("delta", "profile", "sae", "policy")
MAX_DELTA_LABELS = 50


@dataclass
class Exchange:
    """One HTTP request and its answer, as the log line and the metrics see it; filled in along the way.

    `failed_status` is what went wrong after the status line was sent; `error` is set for our own faults only. `gone_at`: when
    the client was seen to have left, of `time.perf_counter`. `allowances`: what the key has left of its limits, now.
    """

    request_id: str
    decisions: Decisions = field(default_factory=Decisions)
    stream: bool = False
    caller: Caller = ANYBODY
    error_code: str | None = None
    error: Exception | None = None
    failed_status: int | None = None
    gone_at: float | None = None
    trace: TraceContext | None = None  # the client's
    allowances: Callable[[], Sequence[Allowance]] = tuple

    def attach(self, scope: MutableMapping[str, Any]) -> None:
        scope.setdefault("state", {})["exchange"] = self

    @staticmethod
    def of(scope: MutableMapping[str, Any]) -> "Exchange":
        exchange: Exchange = scope["state"]["exchange"]
        return exchange


@dataclass(frozen=True)
class Route:
    """What an exchange was about: the route's template, and its handler's name."""

    path: str
    operation: str


class Telemetry:
    """The gateway's metrics in a registry of the caller's choice, and beside it the pages for vLLM's names.

    `tracing`: where spans go to, None for nowhere; `engine_own`: what the engine keeps itself; `compat`: our numbers by those
    names that routers read.
    """

    def __init__(self, registry: CollectorRegistry, max_delta_labels: int = MAX_DELTA_LABELS) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series of every counter and histogram, which nobody reads
        self.registry = registry
        self.tracing: Tracing | None = None
        self.engine_own = CollectorRegistry()
        self.compat = CollectorRegistry()
        self.labels = DeltaLabels(max_delta_labels)
        self.http = HTTPMetrics(registry)
        self.requests = self.http.requests
        self.generation = GenerationMetrics(registry, self.labels)
        self.engine = EngineMetrics(registry)
        self.deltas = DeltaMetrics(registry, self.labels)
        self.combinations = ResidencyMetrics("combination", registry)
        self.edits = ResidencyMetrics("edit", registry)
        self.uploads = {kind: UploadMetrics(kind, registry) for kind in KINDS}
        self.steering = SteeringMetrics(registry)
        self.gate = GateMetrics(registry)
        self.tool_calls = Counter(
            "deltaworks_tool_calls",
            "Tool calls of answers, calls that the gate kept back, and answers with something malformed that looks like one.",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("parsed", "malformed", "suppressed"):
            self.tool_calls.labels(outcome)
        self.key_reloads = Counter(
            "deltaworks_key_reloads",
            "Times that keys were read again, by whether they could be.",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("ok", "error"):
            self.key_reloads.labels(outcome)
        self.labels.bind(self.http.requests)
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)

    def forget_delta(self, name: str) -> None:
        """Drop the series of a deleted delta."""
        self.labels.forget(name)

    def record(self, route: Route, exchange: Exchange, status: int, seconds: float) -> None:
        """Count one answered HTTP request; `status` 499 stands for a client that went away."""
        made, code = exchange.decisions, exchange.error_code
        label = self.labels.of(made.delta)
        self.http.requests.labels(route.path, str(status), label, str(exchange.stream).lower()).inc()
        self.http.record(route.path, route.operation, status, seconds, code)
        broken = None
        if status == CLIENT_GONE:
            gone_at = exchange.gone_at or made.started + seconds
            self.http.count_gone(made.phase, made.started + seconds - gone_at)
            broken = "cancelled"
        elif status >= 400:
            broken = "deadline" if code == "deadline_exceeded" else "error"
        self.generation.record(made, broken)
        if made.steered is not None:
            self.steering.record(made.steered)
        if made.tool_calls is not None:
            self.tool_calls.labels("parsed").inc(made.tool_calls.parsed)
            self.tool_calls.labels("malformed").inc(made.tool_calls.malformed)
            self.tool_calls.labels("suppressed").inc(made.tool_calls.suppressed)
        if made.gated is not None:
            self.gate.record(made.gated)

    def describe_build(self, version: str, git_sha: str, engine: str, engine_version: str) -> None:
        facts = {"version": version, "git_sha": git_sha, "python": platform.python_version()}
        info = Info("deltaworks_build", "The software that runs.", registry=self.registry)
        info.info({**facts, "engine": engine, "engine_version": engine_version})

    def watch_model(self, base: str, fingerprint: str, dtype: Callable[[], str]) -> None:
        """`dtype` may be unknown, "", until the engine has started."""
        labels = ["base_model", "base_fingerprint", "dtype"]
        short = fingerprint.removeprefix("sha256:")[:12]
        self.registry.register(
            _Watched(
                "deltaworks_model_info", "The base model.", labels, lambda: {(base, short, dtype() or "unknown"): 1}
            )
        )

    def watch_state(self, states: Iterable[str], state: Callable[[], str]) -> None:
        """`state` is one of `states`."""
        known = tuple(states)
        self.registry.register(
            _Watched(
                "deltaworks_up_state",
                "1 for the state that the server is in, 0 for the others.",
                ["state"],
                lambda: {(name,): name == state() for name in known},
            )
        )

    def watch_engine(self, own_metrics: Callable[[], Iterable[Metric]]) -> None:
        self.engine_own.register(_Own(own_metrics))

    def offer_compat(self, model: str, max_lora: int, names: Callable[[str], Iterable[str]]) -> None:
        """`names`: those of a digest. `max_lora`: how many deltas fit into one batch."""
        collector = CompatCollector(model, max_lora, names, self.engine, self.generation, self.http)
        self.compat.register(collector)

    def watch_store(self, nbytes: Callable[[], int], free_nbytes: Callable[[], float]) -> None:
        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(f"deltaworks_{name}", text, registry=self.registry).set_function(value)

        gauge("delta_disk_bytes", "Artifacts of all kinds in the store.", nbytes)
        gauge("store_free_bytes", "What the store's disk has left; NaN of a store that is no local disk.", free_nbytes)

    def watch_admission(self, rows: Callable[[], int], queued_tokens: Callable[[], int]) -> None:
        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(f"deltaworks_{name}", text, registry=self.registry).set_function(value)

        gauge("rows_in_flight", "Rows that requests were admitted for: prompts times choices.", rows)
        gauge("queue_tokens", "Tokens of prompts that wait for their first output token.", queued_tokens)
        gauge(
            "queue_depth",
            "Requests that wait for admission or their delta, and rows that wait in the engine.",
            self._depth,
        )

    def _depth(self) -> int:
        return self.generation.in_phase("queued", "loading_delta") + self.engine.last.waiting


class _Watched(Collector):
    """A gauge whose label sets and values are asked for at every scrape."""

    def __init__(
        self, name: str, text: str, labels: list[str], values: Callable[[], dict[tuple[str, ...], float]]
    ) -> None:
        self._name, self._text, self._labels, self._values = name, text, labels, values

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in self._values().items():
            family.add_metric(list(labels), value)
        yield family


class _Own(Collector):
    def __init__(self, own_metrics: Callable[[], Iterable[Metric]]) -> None:
        self._own_metrics = own_metrics

    def collect(self) -> Iterable[Metric]:
        return self._own_metrics()
