"""Metrics and the log line: right counts, bounded series, no secrets."""

import json
import logging
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from server.decisions import Decisions
from server.telemetry import MAX_DELTA_LABELS, JsonFormatter, Telemetry

CHAT = {"model": "tiny-base", "messages": [{"role": "user", "content": "canary-prompt"}]}


async def scrape(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(response.text)
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


@pytest.mark.anyio
async def test_requests_tokens_and_residency_are_counted(client: httpx.AsyncClient, upload: Any) -> None:
    await upload("red", b"1")
    for model in ("tiny-base", "red", "red"):
        await client.post("/v1/chat/completions", json={**CHAT, "model": model})
    found = await scrape(client)
    route = "/v1/chat/completions"
    assert found[("deltaworks_requests_total", *sorted((route, "200", "red", "false")))] == 2
    assert found[("deltaworks_requests_total", *sorted((route, "200", "base", "false")))] == 1
    assert found[("deltaworks_tokens_total", *sorted(("generated", "red")))] == 6
    assert found[("deltaworks_tokens_total", *sorted(("prompt", "base")))] == len("u:canary-prompt\n")
    assert found[("deltaworks_time_to_first_token_seconds_count", "delta")] == 2
    assert found[("deltaworks_request_duration_seconds_count", route)] == 3
    assert found[("deltaworks_resident_deltas",)] == 1
    assert found[("deltaworks_resident_delta_bytes",)] == 1000
    assert found[("deltaworks_packed_deltas",)] == 1
    assert found[("deltaworks_packed_delta_bytes",)] == found[("deltaworks_stored_bytes",)] == len(b"1")
    assert found[("deltaworks_delta_loads_total", "disk", "ok")] == 1
    assert found[("deltaworks_delta_load_duration_seconds_count", "disk")] == 1
    assert found[("deltaworks_delta_read_duration_seconds_count",)] == 1
    assert found[("deltaworks_delta_uploads_total", "created")] == 1
    assert found[("deltaworks_requests_in_flight",)] == 0


@pytest.mark.anyio
async def test_invented_names_and_paths_make_no_series(client: httpx.AsyncClient) -> None:
    async def flood(tag: str) -> int:
        for number in range(20):
            name = f"{tag}{number}"
            assert (await client.post("/v1/chat/completions", json={**CHAT, "model": name})).status_code == 404
            await client.get(f"/{name}")
            await client.get(f"/v1/models/{name}")
        return len(await scrape(client))

    await flood("a")
    assert await flood("b") == await flood("c")
    found = await scrape(client)
    assert found[("deltaworks_requests_total", *sorted(("/v1/chat/completions", "404", "none", "false")))] == 60
    assert found[("deltaworks_requests_total", *sorted(("unmatched", "404", "none", "false")))] == 60


def test_delta_labels_are_bounded_and_forgotten() -> None:
    telemetry = Telemetry(CollectorRegistry())
    labels = {telemetry.delta_label(f"d{number}") for number in range(3 * MAX_DELTA_LABELS)}
    assert len(labels) == MAX_DELTA_LABELS + 1
    assert "other" in labels
    decisions = Decisions(delta="d0", delta_digest="x", prompt_tokens=3)
    telemetry.record("/r", 200, 0.1, False, decisions)
    telemetry.forget_delta("d0")
    assert not [s for family in telemetry.registry.collect() for s in family.samples if s.labels.get("delta") == "d0"]


@pytest.mark.anyio
async def test_one_log_line_per_request_without_prompt_or_key(
    client: httpx.AsyncClient, upload: Any, caplog: pytest.LogCaptureFixture
) -> None:
    digest = (await upload("red", b"1")).json()["digest"]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="deltaworks"):
        await client.post("/v1/chat/completions", json={**CHAT, "model": "red"}, headers={"x-request-id": "my-id"})
        await client.get("/health/live")
    (record,) = [record for record in caplog.records if record.name == "deltaworks.request"]
    text = JsonFormatter().format(record)
    line = json.loads(text)
    assert "\n" not in text
    assert "canary-prompt" not in text
    assert "user-key" not in text
    assert (line["request_id"], line["route"], line["status"]) == ("my-id", "/v1/chat/completions", 200)
    assert (line["delta"], line["delta_digest"], line["completion_tokens"]) == ("red", digest, 3)
    assert line["finish_reasons"] == ["stop"]
    assert line["key"]


@pytest.mark.anyio
async def test_our_own_fault_is_logged_with_its_trace(
    client: httpx.AsyncClient, house: Any, caplog: pytest.LogCaptureFixture
) -> None:
    house.engine.fail_at = 0
    with caplog.at_level(logging.INFO, logger="deltaworks"):
        await client.post("/v1/chat/completions", json=CHAT)
    (record,) = [record for record in caplog.records if record.name == "deltaworks.request"]
    assert record.levelname == "ERROR"
    line = json.loads(JsonFormatter().format(record))
    assert (line["status"], line["code"]) == (500, "engine_error")
    assert "EngineError: the fake engine fails here" in line["exception"]
