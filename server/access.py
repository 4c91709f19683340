"""What happens once for every HTTP exchange: a request id, the last net for errors, one log line, the metrics."""

import json
import logging
import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import asdict
from typing import Any

from server import gate_report
from server.build import installed
from server.decisions import Steered
from server.errors import describe
from server.telemetry import Exchange, Route, Telemetry
from server.tracing import Ended, TraceContext, parse_traceparent

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{1,128}")
# Probes and scrapes come every few seconds and say nothing that the metrics do not.
UNLOGGED = (
    *("/health", "/health/live", "/health/ready", "/ping"),
    *("/metrics", "/metrics/engine", "/metrics/compat"),
)

log = logging.getLogger("deltaworks.request")


class AccessMiddleware:
    """Plain ASGI, outermost: also an answer to an unknown route or a crash has its id, its log line and its count."""

    def __init__(self, app: App, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(_request_id(scope["headers"]), trace=_trace(scope["headers"]))
        exchange.attach(scope)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_headers(exchange)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # noqa: BLE001 - one of the two outermost handlers (the other is in sse.py)
            exchange.error = error
            problem = describe(error)
            exchange.error_code = problem.code
            if not status:
                await send_json(send_with_id, problem.status, problem.body)
        finally:
            self._finish(scope, exchange, exchange.failed_status or status or 499)

    def _finish(self, scope: MutableMapping[str, Any], exchange: Exchange, status: int) -> None:
        found = scope.get("route")
        route = getattr(found, "path", "unmatched")
        seconds = time.perf_counter() - exchange.decisions.started
        operation = getattr(found, "name", "unmatched")
        self._telemetry.record(Route(route, operation), exchange, status, seconds)
        if route in UNLOGGED and exchange.error is None:
            return
        made, trace = exchange.decisions, exchange.trace
        span = None
        if self._telemetry.tracing is not None:
            ended = Ended(scope["method"], route, status, seconds, exchange.request_id, exchange.error_code)
            span = self._telemetry.tracing.record(trace, ended, made)
        place = span or trace
        fields = {
            "request_id": exchange.request_id,
            "trace_id": place.trace_id if place else None,
            "span_id": span.span_id if span else None,
            "method": scope["method"],
            "route": route,
            "status": status,
            "code": exchange.error_code,
            "key": exchange.caller.key_id,
            "stream": exchange.stream,
            "delta": made.delta,
            "delta_digest": made.delta_digest,
            "prompt_tokens": made.usage.prompt_tokens,
            "cached_tokens": made.usage.cached_tokens,
            "completion_tokens": made.usage.completion_tokens,
            "finish_reasons": made.finish_reasons,
            "client_gone": status == 499,
            "queue_s": _rounded(made.queue_s),
            "swap": made.swap,
            "swap_s": _rounded(made.delta_wait_s),
            "ttft_s": _rounded(made.ttft_s),
            "decode_s": _rounded(made.decode_s),
            "total_s": _rounded(seconds),
        }
        if made.parts:
            fields["deltas"] = [asdict(part) for part in made.parts]
        if made.steered is not None:
            fields["steering"] = _steering(made.steered)
            fields["warnings"] = [warning.code for warning in made.warnings]
        if made.tool_calls is not None:
            fields["tools"] = asdict(made.tool_calls)
        if made.gated is not None and (told := gate_report.record(made.gated)) is not None:
            fields["tool_gate"] = told
        level = logging.ERROR if exchange.error else logging.INFO
        log.log(level, "request", extra={"fields": fields}, exc_info=exchange.error)


def _headers(exchange: Exchange) -> list[tuple[bytes, bytes]]:
    """Of every answer; those about a delta where a request has come so far, those about limits where the key has some."""
    made = exchange.decisions
    waits_s = {"x-queue-time-ms": made.queue_s, "x-swap-time-ms": made.delta_wait_s}
    told = {
        "x-request-id": exchange.request_id,
        "x-gateway-version": installed().version,
        "x-delta-id": made.delta,
        "x-delta-version": made.delta_version,
        **{name: None if waited_s is None else f"{waited_s * 1000:.1f}" for name, waited_s in waits_s.items()},
    }
    for left in exchange.allowances():
        told[f"x-ratelimit-limit-{left.what}"] = str(left.limit)
        told[f"x-ratelimit-remaining-{left.what}"] = str(left.remaining)
        told[f"x-ratelimit-reset-{left.what}"] = f"{math.ceil(left.reset_s * 1000)}ms"
    found = [(name.encode(), value.encode()) for name, value in told.items() if value is not None]
    return found + gate_report.headers(made.gated)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _steering(steered: Steered) -> dict[str, Any]:
    return {
        "mode": steered.mode,
        "outcome": steered.outcome,
        "profile": steered.profile,
        "profile_digest": steered.profile_digest,
        "direction": steered.direction,
        "strength": steered.strength,
        "fingerprint": steered.fingerprint,
        "features": steered.features,
        "edited_rows": steered.edited_rows,
        "rel_norm": max((layer.rel_norm for layer in steered.layers), default=None),
        "conflict_score": steered.score,
        "overhead_s": round(steered.overhead_s, 6),
    }


def _trace(headers: list[tuple[bytes, bytes]]) -> TraceContext | None:
    return parse_traceparent(next((value for name, value in headers if name == b"traceparent"), b""))


def _request_id(headers: list[tuple[bytes, bytes]]) -> str:
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    return given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


async def send_json(send: Send, status: int, body: dict[str, Any], headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    content = json.dumps(body).encode()
    told = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": told})
    await send({"type": "http.response.body", "body": content})
