"""What is counted of every HTTP exchange: answers, errors, refusals, keys that failed, admin calls, clients that left."""

from collections.abc import Iterable
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram

from server.decisions import Phase

DURATION_EDGES = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
CANCEL_EDGES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
GENERATION_ROUTES = ("/v1/chat/completions", "/v1/completions")
ADMIN_PREFIX = "/v1/admin/"
CLIENT_GONE = 499

# Error codes of requests that were turned away before any work -> why.
_REJECTIONS = {
    "server_overloaded": "queue_full",
    "rate_limit_exceeded": "rate_limit",
    "tenant_concurrency_exceeded": "tenant_limit",
    "draining": "draining",
    "loading": "loading",
    "delta_capacity": "delta_capacity",
    "combination_capacity": "delta_capacity",
    "body_too_large": "too_large",
    "missing_api_key": "auth",
    "invalid_api_key": "auth",
    "admin_disabled": "auth",
    "insufficient_scope": "auth",
}
_AUTH = {
    "missing_api_key": "missing",
    "invalid_api_key": "invalid",
    "admin_disabled": "scope",
    "insufficient_scope": "scope",
}


class HTTPMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"deltaworks_{name}", text, labels, registry=registry)

        self.requests = counter("requests", "HTTP requests answered.", "route", "code", "delta", "stream")
        self.duration = Histogram(
            "deltaworks_request_duration_seconds",
            "Time from the request's arrival to the end of its answer.",
            ["route", "outcome"],
            buckets=DURATION_EDGES,
            registry=registry,
        )
        self._errors = counter("request_errors", "Requests that ended with an error, by its code.", "code", "route")
        self._rejected = counter("requests_rejected", "Requests turned away before any work, by why.", "reason")
        self._auth = counter(
            "auth_failures", "Requests whose key was missing, unknown or not enough.", "plane", "reason"
        )
        self._admin = counter("admin_operations", "Calls of the admin plane, by handler.", "operation", "outcome")
        self._gone = counter("client_disconnects", "Clients that left before their answer was whole.", "phase")
        self._cancel = Histogram(
            "deltaworks_cancel_latency_seconds",
            "From a client's leaving until its rows are aborted and its permit and leases returned.",
            buckets=CANCEL_EDGES,
            registry=registry,
        )
        for reason in {*_REJECTIONS.values()}:
            self._rejected.labels(reason)
        for plane in ("inference", "admin"):
            for reason in {*_AUTH.values()}:
                self._auth.labels(plane, reason)
        for phase in get_args(Phase):
            self._gone.labels(phase)
        for route in GENERATION_ROUTES:
            for outcome in ("ok", "error", "cancelled"):
                self.duration.labels(route, outcome)

    def expect(self, operations: Iterable[str], codes: Iterable[str]) -> None:
        """Start the series of the admin plane's handlers and of the error table's codes at 0."""
        for operation in operations:
            for outcome in ("ok", "rejected", "error"):
                self._admin.labels(operation, outcome)
        for code in codes:
            for route in GENERATION_ROUTES:
                self._errors.labels(code, route)

    def record(self, route: str, operation: str, status: int, seconds: float, code: str | None) -> None:
        """`code` is the error's, None of an answer that is none."""
        self.duration.labels(route, outcome_of(status)).observe(seconds)
        if code is not None:
            self._errors.labels(code, route).inc()
            if code in _REJECTIONS:
                self._rejected.labels(_REJECTIONS[code]).inc()
            if code in _AUTH:
                self._auth.labels("admin" if route.startswith(ADMIN_PREFIX) else "inference", _AUTH[code]).inc()
        if route.startswith(ADMIN_PREFIX):
            outcome = "ok" if status < 400 else "error" if status >= 500 else "rejected"
            self._admin.labels(operation, outcome).inc()

    def count_gone(self, phase: Phase, cancel_s: float) -> None:
        self._gone.labels(phase).inc()
        self._cancel.observe(cancel_s)


def outcome_of(status: int) -> str:
    if status == CLIENT_GONE:
        return "cancelled"
    return "ok" if status < 400 else "error"
