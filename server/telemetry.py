"""Metrics and the request log. Label values are from closed sets: a name that a client sends never makes a series."""

import json
import logging
import sys
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server.decisions import Decisions, Steered, SteeringMode, SteeringOutcome
from server.gate_report import SCORE_EDGES, GateMetrics
from server.keys import ANYBODY, Caller

MAX_DELTA_LABELS = 50
LATENCY_EDGES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
LOAD_EDGES = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
OVERHEAD_EDGES = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
FEATURE_EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
REL_NORM_EDGES = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 4)
KINDS = ("delta", "profile", "sae", "policy")


@dataclass
class Exchange:
    """One HTTP request and its answer, as the log line and the metrics see it; filled in along the way.

    `failed_status` is what went wrong after the status line was sent; `error` is set for our own faults only.
    """

    request_id: str
    decisions: Decisions = field(default_factory=Decisions)
    stream: bool = False
    caller: Caller = ANYBODY
    error_code: str | None = None
    error: Exception | None = None
    failed_status: int | None = None

    def attach(self, scope: MutableMapping[str, Any]) -> None:
        scope.setdefault("state", {})["exchange"] = self

    @staticmethod
    def of(scope: MutableMapping[str, Any]) -> "Exchange":
        exchange: Exchange = scope["state"]["exchange"]
        return exchange


class ResidencyMetrics:
    """What a pool counts; `kind` is what it holds."""

    def __init__(self, kind: str, registry: CollectorRegistry, sources: tuple[str, ...] = ()) -> None:
        """`sources`: where loads of the kind may read from, where that is told."""
        labels = ["source"] if sources else []
        self._resident = Gauge(f"deltaworks_resident_{kind}s", f"{kind}s in the engine's memory.", registry=registry)
        self._loads = Counter(
            f"deltaworks_{kind}_loads", f"{kind}s made resident.", [*labels, "outcome"], registry=registry
        )
        self._load_seconds = Histogram(
            f"deltaworks_{kind}_load_duration_seconds",
            f"Time to make a {kind} resident, without the wait for room.",
            labels,
            buckets=LOAD_EDGES,
            registry=registry,
        )
        self._evictions = Counter(
            f"deltaworks_{kind}_evictions",
            f"{kind}s dropped to make room.",
            ["level"] if sources else [],
            registry=registry,
        )
        self._told = bool(sources)
        for source in sources or ("",):
            for outcome in ("ok", "error"):
                self._of(self._loads, source, outcome)
            self._of(self._load_seconds, source)

    def count_load(self, source: str, outcome: str) -> None:
        self._of(self._loads, source, outcome).inc()

    def time_load(self, source: str, seconds: float) -> None:
        self._of(self._load_seconds, source).observe(seconds)

    def count_eviction(self, level: str = "engine") -> None:
        self._of(self._evictions, level).inc()

    def show_resident(self, count: int, nbytes: int) -> None:
        self._resident.set(count)

    def _of(self, metric: Any, told: str, *labels: str) -> Any:
        """The series of a metric; `told` is its first label where sources are told."""
        labels = (told, *labels) if self._told else labels
        return metric.labels(*labels) if labels else metric


class DeltaMetrics(ResidencyMetrics):
    """Deltas on two levels above the disk: in execution form ("engine"), and packed in RAM ("ram")."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__("delta", registry, sources=("disk", "ram"))

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"deltaworks_{name}", text, registry=registry)

        self._resident_bytes = gauge("resident_delta_bytes", "Engine memory that resident deltas take.")
        self._packed = gauge("packed_deltas", "Deltas whose files are kept in RAM.")
        self._packed_bytes = gauge("packed_delta_bytes", "RAM that the files of deltas take.")
        self.pinned = gauge("pinned_deltas", "Deltas that stay resident also without requests.")
        self.read_seconds = Histogram(
            "deltaworks_delta_read_duration_seconds",
            "Time to read a delta's file into RAM.",
            buckets=LOAD_EDGES,
            registry=registry,
        )
        self.refused = Counter(
            "deltaworks_delta_loads_refused",
            "Requests for deltas whose load had failed a moment ago.",
            registry=registry,
        )
        for level in ("engine", "ram"):
            self._of(self._evictions, level)

    def show_resident(self, count: int, nbytes: int) -> None:
        super().show_resident(count, nbytes)
        self._resident_bytes.set(nbytes)

    def show_packed(self, count: int, nbytes: int) -> None:
        self._packed.set(count)
        self._packed_bytes.set(nbytes)


class SteeringMetrics:
    """Requests that asked for an edit or a conflict score. Profiles and features are never labels."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, edges: tuple[float, ...]) -> Histogram:
            return Histogram(f"deltaworks_{name}", text, buckets=edges, registry=registry)

        self.requests = Counter(
            "deltaworks_steering_requests",
            "Requests that asked to be steered or scored.",
            ["mode", "outcome"],
            registry=registry,
        )
        self.features = histogram("steering_feature_edits", "Latents that a request's edit works on.", FEATURE_EDGES)
        self.overhead = histogram(
            "steering_overhead_seconds", "Time that steering took of a request outside the engine.", OVERHEAD_EDGES
        )
        self.rows = Counter(
            "deltaworks_steering_edited_rows", "Rows of activations edited, over all layers.", registry=registry
        )
        self.rel_norm = histogram(
            "steering_rel_norm_ratio", "Norm of a layer's edit over the norm of what it edits.", REL_NORM_EDGES
        )
        self.score = histogram("conflict_score_ratio", "Scores of the conflict probe.", SCORE_EDGES)
        for mode in get_args(SteeringMode):
            for outcome in get_args(SteeringOutcome):
                self.requests.labels(mode, outcome)

    def record(self, steered: Steered) -> None:
        self.requests.labels(steered.mode, steered.outcome).inc()
        self.overhead.observe(steered.overhead_s)
        if steered.features:
            self.features.observe(steered.features)
        self.rows.inc(steered.edited_rows)
        for layer in steered.layers:
            self.rel_norm.observe(layer.rel_norm)
        if steered.score is not None:
            self.score.observe(steered.score)


class Telemetry:
    """The gateway's metrics in a registry of the caller's choice."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._delta_labels: set[str] = set()
        self.requests = Counter(
            "deltaworks_requests", "HTTP requests answered.", ["route", "code", "delta", "stream"], registry=registry
        )
        self.duration = Histogram(
            "deltaworks_request_duration_seconds",
            "Time from the request's arrival to the end of its answer.",
            ["route"],
            buckets=LATENCY_EDGES,
            registry=registry,
        )
        self.ttft = Histogram(
            "deltaworks_time_to_first_token_seconds",
            "Time from the request's arrival to its first token.",
            ["kind"],
            buckets=LATENCY_EDGES,
            registry=registry,
        )
        self.tokens = Counter("deltaworks_tokens", "Tokens read and generated.", ["kind", "delta"], registry=registry)
        self.in_flight = Gauge("deltaworks_requests_in_flight", "Generation rows in flight.", registry=registry)
        self.queued_tokens = Gauge(
            "deltaworks_queued_tokens", "Prompt tokens waiting for their first output token.", registry=registry
        )
        self.deltas = DeltaMetrics(registry)
        self.combinations = ResidencyMetrics("combination", registry)
        self.edits = ResidencyMetrics("edit", registry)
        self.stored_bytes = Gauge("deltaworks_stored_bytes", "Artifacts of all kinds on the disk.", registry=registry)
        self.steering = SteeringMetrics(registry)
        self.tool_calls = Counter(
            "deltaworks_tool_calls",
            "Tool calls of answers, calls that the gate kept back, and answers with something malformed that looks like one.",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("parsed", "malformed", "suppressed"):
            self.tool_calls.labels(outcome)
        self.gate = GateMetrics(registry)
        self.uploads = {
            kind: Counter(f"deltaworks_{kind}_uploads", f"Uploads of a {kind}.", ["outcome"], registry=registry)
            for kind in KINDS
        }
        for uploads in self.uploads.values():
            for outcome in ("created", "identical", "rejected"):
                uploads.labels(outcome)

    def delta_label(self, delta: str | None) -> str:
        """`delta` must be a registered name or one of the words that no delta may have; None is a request that resolved none."""
        if delta is None:
            return "none"
        if delta not in self._delta_labels and len(self._delta_labels) >= MAX_DELTA_LABELS:
            return "other"
        self._delta_labels.add(delta)
        return delta

    def forget_delta(self, name: str) -> None:
        """Drop the series of a deleted delta, so that they do not go on being scraped."""
        self._delta_labels.discard(name)
        self.requests.remove_by_labels({"delta": name})
        self.tokens.remove_by_labels({"delta": name})

    def record(self, route: str, code: int, seconds: float, stream: bool, decisions: Decisions) -> None:
        """Count one answered HTTP request; `code` 499 stands for a client that went away."""
        label = self.delta_label(decisions.delta)
        self.requests.labels(route, str(code), label, str(stream).lower()).inc()
        self.duration.labels(route).observe(seconds)
        if decisions.ttft_s is not None:
            self.ttft.labels("delta" if decisions.delta_digest else "base").observe(decisions.ttft_s)
        if decisions.prompt_tokens:
            self.tokens.labels("prompt", label).inc(decisions.prompt_tokens)
            self.tokens.labels("generated", label).inc(decisions.completion_tokens)
        if decisions.steered is not None:
            self.steering.record(decisions.steered)
        if decisions.tool_calls is not None:
            self.tool_calls.labels("parsed").inc(decisions.tool_calls.parsed)
            self.tool_calls.labels("malformed").inc(decisions.tool_calls.malformed)
            self.tool_calls.labels("suppressed").inc(decisions.tool_calls.suppressed)
        if decisions.gated is not None:
            self.gate.record(decisions.gated)

    def watch_store(self, nbytes: Callable[[], int]) -> None:
        self.stored_bytes.set_function(nbytes)

    def watch_admission(self, rows: Callable[[], int], queued_tokens: Callable[[], int]) -> None:
        self.in_flight.set_function(rows)
        self.queued_tokens.set_function(queued_tokens)


class JsonFormatter(logging.Formatter):
    """One JSON object a line. Fields arrive as the record's `fields`; prompts and keys never do."""

    def format(self, record: logging.LogRecord) -> str:
        created = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "ts": f"{created}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_json(level: int = logging.INFO) -> None:
    """Send the gateway's and uvicorn's log lines to standard error as JSON; called once, by the CLI."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("deltaworks", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
