"""Metrics and the request log. Label values are from closed sets: a name that a client sends never makes a series."""

import json
import logging
import sys
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server.core import Decisions

MAX_DELTA_LABELS = 50
LATENCY_EDGES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
LOAD_EDGES = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


@dataclass
class Exchange:
    """One HTTP request and its answer, as the log line and the metrics see it; filled in along the way.

    `failed_status` is what went wrong after the status line was sent; `error` is set for our own faults only.
    """

    request_id: str
    decisions: Decisions = field(default_factory=Decisions)
    stream: bool = False
    key_id: str | None = None
    error_code: str | None = None
    error: Exception | None = None
    failed_status: int | None = None

    def attach(self, scope: MutableMapping[str, Any]) -> None:
        scope.setdefault("state", {})["exchange"] = self

    @staticmethod
    def of(scope: MutableMapping[str, Any]) -> "Exchange":
        exchange: Exchange = scope["state"]["exchange"]
        return exchange


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
        self.resident = Gauge("deltaworks_resident_deltas", "Deltas in the engine's memory.", registry=registry)
        self.resident_bytes = Gauge(
            "deltaworks_resident_delta_bytes", "Engine memory that resident deltas take.", registry=registry
        )
        self.loads = Counter("deltaworks_delta_loads", "Deltas made resident.", ["outcome"], registry=registry)
        self.load_seconds = Histogram(
            "deltaworks_delta_load_duration_seconds",
            "Time to make a delta resident.",
            buckets=LOAD_EDGES,
            registry=registry,
        )
        self.evictions = Counter("deltaworks_delta_evictions", "Deltas dropped to make room.", registry=registry)
        self.uploads = Counter("deltaworks_delta_uploads", "Delta uploads.", ["outcome"], registry=registry)
        for outcome in ("ok", "error"):
            self.loads.labels(outcome)
        for outcome in ("created", "identical", "rejected"):
            self.uploads.labels(outcome)

    def delta_label(self, delta: str | None) -> str:
        """`delta` must be a registered name; None is a request that resolved none."""
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
