"""OpenTelemetry spans of generation requests, made when a request has ended, from the times that it noted on the way.

Nothing of OpenTelemetry is imported where no endpoint is set. A client's W3C `traceparent` is read all the same: its trace id is
in the log line.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue

    from server.decisions import Decisions

_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MAX_MODEL_CHARS = 256


class TracingError(Exception):
    """Traces are asked for, and what sends them is not installed."""


@dataclass(frozen=True)
class TraceContext:
    """A place in a trace, in W3C's words: of the client's span, or of our own."""

    trace_id: str
    span_id: str
    sampled: bool


@dataclass(frozen=True)
class Ended:
    """A request as its server span tells it; `seconds` from `decisions.started`."""

    method: str
    route: str
    status: int
    seconds: float
    request_id: str
    error_code: str | None


def parse_traceparent(value: bytes) -> TraceContext | None:
    """None where the header is not there, or is not as W3C writes it: the request then begins a trace of its own."""
    found = _TRACEPARENT.fullmatch(value)
    if found is None:
        return None
    version, trace_id, parent_id, flags, rest = (part or b"" for part in found.groups())
    if version == b"ff" or (version == b"00" and rest) or not trace_id.strip(b"0") or not parent_id.strip(b"0"):
        return None
    return TraceContext(trace_id.decode(), parent_id.decode(), bool(int(flags, 16) & 1))


class Tracing:
    """Makes the spans of one request: the server's, and below it those of its steps."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("deltaworks")

    def record(self, parent: TraceContext | None, ended: Ended, decisions: Decisions) -> TraceContext | None:
        """The ids of the server span, or None where the trace is not sampled."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        clock = _Clock()
        began, over = decisions.started, decisions.started + ended.seconds
        span = self._tracer.start_span(
            f"{ended.method} {ended.route}",
            context=_remote(parent),
            kind=SpanKind.SERVER,
            start_time=clock.ns(began),
            attributes=_attributes(ended, decisions),
        )
        if ended.status >= 500:
            span.set_status(Status(StatusCode.ERROR, ended.error_code))
        below = set_span_in_context(span)
        for name, (start, end) in _steps(decisions, over).items():
            child = self._tracer.start_span(name, context=below, start_time=clock.ns(start))
            child.end(clock.ns(end))
        span.end(clock.ns(over))
        made = span.get_span_context()
        if not made.trace_flags.sampled:
            return None
        return TraceContext(f"{made.trace_id:032x}", f"{made.span_id:016x}", sampled=True)

    def close(self) -> None:
        """Send what is left. Blocking, for some seconds at most."""
        self._provider.shutdown()


def send_traces(endpoint: str, share: float, version: str) -> Tracing:
    """To an OTLP collector over HTTP, from a thread of its own. `share` of the traces that begin here, 0 to 1; those of clients
    follow the client's word. Raises TracingError."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    except ImportError as error:
        raise TracingError(
            f"telemetry.otlp_endpoint is set, but {error.name} is not installed: pip install 'deltaworks[otel]'"
        ) from error
    resource = Resource.create({"service.name": "deltaworks", "service.version": version})
    provider = TracerProvider(sampler=ParentBasedTraceIdRatio(share), resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    return Tracing(provider)


class _Clock:
    """`time.perf_counter` and `time.monotonic`, which Linux counts as one, -> nanoseconds since 1970."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.perf_counter_ns()

    def ns(self, seconds: float) -> int:
        return int(seconds * 1e9) + self._offset_ns


def _remote(parent: TraceContext | None) -> Any:
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    if parent is None:
        return Context()
    flags = TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT)
    context = SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=flags)
    return set_span_in_context(NonRecordingSpan(context), Context())


def _steps(decisions: Decisions, over: float) -> dict[str, tuple[float, float]]:
    """Start and end of what the request got to."""
    steps = dict(decisions.steps)
    times = decisions.row_times
    if times is not None:
        steps["queue"] = (times.queued, times.scheduled)
        steps["prefill"] = (times.scheduled, times.first_token)
    if decisions.pace:
        first = times.first_token if times is not None else min(pace.first for pace in decisions.pace.values())
        steps["decode"] = (first, over if decisions.total_s is None else decisions.started + decisions.total_s)
    return steps


def _attributes(ended: Ended, decisions: Decisions) -> dict[str, AttributeValue]:
    """By OpenTelemetry's conventions for HTTP servers and generative models, and our own. Never a prompt, never a key."""
    told: dict[str, AttributeValue | None] = {
        "http.request.method": ended.method,
        "http.route": ended.route,
        "http.response.status_code": ended.status,
        "error.type": ended.error_code,
        "deltaworks.request_id": ended.request_id,
    }
    sampling = decisions.sampling
    if sampling is not None:
        usage = decisions.usage
        steered = decisions.steered
        told |= {
            "gen_ai.operation.name": "chat" if ended.route.endswith("/chat/completions") else "text_completion",
            "gen_ai.provider.name": "deltaworks",
            "gen_ai.request.model": decisions.model[:_MAX_MODEL_CHARS],
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.response.model": decisions.model[:_MAX_MODEL_CHARS] if decisions.delta else None,
            "gen_ai.response.finish_reasons": tuple(decisions.finish_reasons) or None,
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "deltaworks.delta.name": decisions.delta,
            "deltaworks.delta.digest": decisions.delta_digest,
            "deltaworks.swap.kind": decisions.swap,
            "deltaworks.steering.features": steered.features if steered else None,
        }
    return {name: value for name, value in told.items() if value is not None}
