"""Traces: a client's trace goes on in our spans and in the log line; nothing is imported where no endpoint is set."""

import asyncio
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import StatusCode

from server.logs import JsonFormatter
from server.tracing import TraceContext, Tracing, TracingError, parse_traceparent, send_traces

CHAT = {"model": "tiny-base", "messages": [{"role": "user", "content": "canary-prompt"}], "temperature": 0.5}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
pytestmark = pytest.mark.anyio


@pytest.fixture
def spans(house: Any) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=ParentBasedTraceIdRatio(1.0))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    house.context.telemetry.tracing = Tracing(provider)
    return exporter


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def line_of(caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    (record,) = [record for record in caplog.records if record.name == "deltaworks.request"]
    line: dict[str, Any] = json.loads(JsonFormatter().format(record))
    return line


@pytest.mark.parametrize("stream", [False, True])
async def test_o4_a_clients_trace_goes_on(
    client: httpx.AsyncClient, spans: InMemorySpanExporter, upload: Any, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    digest = (await upload("red", b"1")).json()["digest"]
    spans.clear()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="deltaworks"):
        await client.post(
            "/v1/chat/completions", json={**CHAT, "model": "red", "max_tokens": 9, "stream": stream}, headers=SAMPLED
        )
    found = by_name(spans)
    assert set(found) == {"POST /v1/chat/completions", "resolve_delta", "load_delta", "queue", "prefill", "decode"}
    server = found.pop("POST /v1/chat/completions")
    assert (f"{server.context.trace_id:032x}", f"{server.parent.span_id:016x}") == (TRACE, PARENT)
    for span in found.values():
        assert span.parent.span_id == server.context.span_id
        assert span.start_time <= span.end_time <= server.end_time
    assert found["resolve_delta"].end_time <= found["load_delta"].start_time
    assert found["queue"].end_time - found["queue"].start_time == pytest.approx(0.25e9, abs=1e6)
    assert found["queue"].end_time == found["prefill"].start_time
    assert found["prefill"].end_time == found["decode"].start_time
    assert server.start_time <= found["resolve_delta"].start_time
    told = dict(server.attributes)
    expected = {
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "red",
        "gen_ai.response.model": "red",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.usage.input_tokens": len("u:canary-prompt\n"),
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("stop",),
        "deltaworks.delta.name": "red",
        "deltaworks.delta.digest": digest,
        "deltaworks.swap.kind": "cold",
    }
    assert expected.items() <= told.items()
    assert "canary" not in str([span.to_json() for span in spans.get_finished_spans()])
    line = line_of(caplog)
    assert (line["trace_id"], line["span_id"]) == (TRACE, f"{server.context.span_id:016x}")


async def test_a_request_without_a_trace_begins_one(client: httpx.AsyncClient, spans: InMemorySpanExporter) -> None:
    await client.post("/v1/chat/completions", json=CHAT, headers={"traceparent": "00-nonsense"})
    server = by_name(spans)["POST /v1/chat/completions"]
    assert server.parent is None
    assert "load_delta" not in by_name(spans)


async def test_an_error_is_in_its_span(client: httpx.AsyncClient, spans: InMemorySpanExporter, house: Any) -> None:
    house.engine.fail_at = 0
    await client.post("/v1/chat/completions", json=CHAT)
    server = by_name(spans)["POST /v1/chat/completions"]
    assert (server.status.status_code, server.attributes["error.type"]) == (StatusCode.ERROR, "engine_error")


async def test_what_the_client_does_not_sample_is_not_sent(
    client: httpx.AsyncClient, spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="deltaworks"):
        await client.post("/v1/chat/completions", json=CHAT, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert spans.get_finished_spans() == ()
    assert line_of(caplog)["trace_id"] == TRACE


async def test_probes_make_no_spans(client: httpx.AsyncClient, spans: InMemorySpanExporter) -> None:
    for path in ("/health/live", "/health/ready", "/metrics"):
        await client.get(path)
    assert spans.get_finished_spans() == ()


async def test_o4_the_trace_is_in_the_log_without_tracing(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="deltaworks"):
        await client.post("/v1/chat/completions", json=CHAT, headers=SAMPLED)
    line = line_of(caplog)
    assert (line["trace_id"], line["span_id"]) == (TRACE, None)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        f"00-{TRACE}-{PARENT}".encode(),
        f"00-{TRACE.upper()}-{PARENT}-01".encode(),
        f"ff-{TRACE}-{PARENT}-01".encode(),
        f"00-{'0' * 32}-{PARENT}-01".encode(),
        f"00-{TRACE}-{'0' * 16}-01".encode(),
        f"00-{TRACE}-{PARENT}-01-more".encode(),
        f"00-{TRACE}-{PARENT}-01\n".encode(),
    ],
)
async def test_what_is_no_traceparent(header: bytes) -> None:
    assert parse_traceparent(header) is None


async def test_a_later_version_of_traceparent_may_say_more() -> None:
    assert parse_traceparent(f"01-{TRACE}-{PARENT}-01-more".encode()) == TraceContext(TRACE, PARENT, sampled=True)


async def test_spans_reach_a_collector() -> None:
    """Over the wire, to a server of the test's own."""
    received = asyncio.Queue[bytes]()

    async def collect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
        )
        received.put_nowait(head.split(b"\r\n")[0] + await reader.readexactly(length))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(collect, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        tracing = send_traces(f"http://127.0.0.1:{port}/v1/traces", 1.0, "1")
        with tracing._tracer.start_as_current_span("hello"):
            pass
        await asyncio.to_thread(tracing.close)
        assert (await received.get()).startswith(b"POST /v1/traces HTTP/1.1")


async def test_without_the_extra_the_error_names_it() -> None:
    code = (
        "import sys\n"
        "sys.modules['opentelemetry.sdk.trace'] = None\n"
        "from server.tracing import TracingError, send_traces\n"
        "try:\n"
        "    send_traces('http://127.0.0.1:1', 1.0, '1')\n"
        "except TracingError as error:\n"
        "    print(error)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.startswith("telemetry.otlp_endpoint is set, but opentelemetry.sdk.trace is not installed"), done
    assert "deltaworks[otel]" in done.stdout
    assert issubclass(TracingError, Exception)


async def test_nothing_of_opentelemetry_is_imported_without_an_endpoint() -> None:
    code = (
        "import sys, server.app, server.wiring\nsys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
