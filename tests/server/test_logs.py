"""The log: one line per request with numbers and names, without prompts and keys, and nothing that breaks a line."""

import io
import json
import logging
from typing import Any

import httpx
import pytest

from server.access import UNLOGGED
from server.logs import JsonFormatter, TextFormatter, log_to_stderr

CHAT = {"model": "tiny-base", "messages": [{"role": "user", "content": "canary-prompt"}]}
pytestmark = pytest.mark.anyio


def requests_in(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "deltaworks.request"]


async def test_s7_one_log_line_per_request_without_prompt_or_key(
    client: httpx.AsyncClient, upload: Any, caplog: pytest.LogCaptureFixture
) -> None:
    digest = (await upload("red", b"1")).json()["digest"]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="deltaworks"):
        await client.post("/v1/chat/completions", json={**CHAT, "model": "red"}, headers={"x-request-id": "my-id"})
        for path in UNLOGGED:
            await client.get(path)
    (record,) = requests_in(caplog)
    for text in (JsonFormatter().format(record), TextFormatter().format(record)):
        assert "\n" not in text
        assert "canary-prompt" not in text
        assert "user-key" not in text
    line = json.loads(JsonFormatter().format(record))
    assert (line["request_id"], line["route"], line["status"]) == ("my-id", "/v1/chat/completions", 200)
    assert (line["delta"], line["delta_digest"], line["completion_tokens"]) == ("red", digest, 3)
    assert (line["finish_reasons"], line["client_gone"], line["swap"]) == (["stop"], False, "cold")
    assert line["queue_s"] == pytest.approx(0.25, abs=0.1)
    assert 0 < line["swap_s"] < line["ttft_s"] < line["total_s"]
    assert (line["level"], line["logger"], line["msg"]) == ("info", "deltaworks.request", "request")
    assert line["ts"].endswith("Z")
    assert line["key"]


async def test_our_own_fault_is_logged_with_its_trace(
    client: httpx.AsyncClient, house: Any, caplog: pytest.LogCaptureFixture
) -> None:
    house.engine.fail_at = 0
    with caplog.at_level(logging.INFO, logger="deltaworks"):
        await client.post("/v1/chat/completions", json=CHAT)
    (record,) = requests_in(caplog)
    assert record.levelname == "ERROR"
    line = json.loads(JsonFormatter().format(record))
    assert (line["status"], line["code"]) == (500, "engine_error")
    assert "EngineError: the fake engine fails here" in line["exception"]
    assert "\n" not in TextFormatter().format(record)


async def test_a_path_or_an_id_cannot_write_a_line_of_its_own(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="deltaworks"):
        await client.get("/v1/models/%0a%7b%22level%22:%22error%22%7d", headers={"x-request-id": "a b"})
    (record,) = requests_in(caplog)
    line = json.loads(JsonFormatter().format(record))
    assert (line["route"], line["status"]) == ("unmatched", 404)
    assert line["request_id"] != "a b"


async def test_control_characters_are_escaped() -> None:
    record = logging.LogRecord("deltaworks.x", logging.INFO, "f", 1, "a\nb\x1b[31m\u2028c", (), None)
    record.fields = {"name": 'x\ny="z"', "word": "plain", "none": None, "number": 1.5}
    text = TextFormatter().format(record)
    assert text.endswith(r' INFO deltaworks.x a\u000ab\u001b[31m\u2028c name="x\ny=\"z\"" word=plain number=1.5')
    line = JsonFormatter().format(record)
    assert line.isprintable()
    assert json.loads(line)["msg"] == "a\nb\x1b[31m\u2028c"


@pytest.mark.parametrize("log_format", ["json", "text"])
async def test_the_format_is_a_setting(log_format: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    loggers = [logging.getLogger(name) for name in ("deltaworks", "uvicorn", "opentelemetry")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    try:
        log_to_stderr(log_format)
        logging.getLogger("deltaworks.request").info("request", extra={"fields": {"status": 200}})
    finally:
        for logger, (logger.handlers, level, logger.propagate) in zip(loggers, before, strict=True):
            logger.setLevel(level)
    (line,) = stream.getvalue().splitlines()
    if log_format == "json":
        assert json.loads(line)["status"] == 200
    else:
        assert line.endswith(" INFO deltaworks.request request status=200")
