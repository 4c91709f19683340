"""Metrics: right counts, closed sets of labels that start at 0, bounded series."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families

from server.decisions import Decisions
from server.gateway import State
from server.metrics.labels import IDLE_S
from server.telemetry import MAX_DELTA_LABELS, Exchange, Route, Telemetry
from tests.server.conftest import API

CHAT = {"model": "tiny-base", "messages": [{"role": "user", "content": "canary-prompt"}]}
ROUTE = "/v1/chat/completions"
pytestmark = pytest.mark.anyio


async def scrape(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    """By name without our prefix, and the labels' values in the order of their names."""
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (s.name.removeprefix("deltaworks_"), *(value for _, value in sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(response.text)
        for s in family.samples
    }


async def test_requests_tokens_and_residency_are_counted(client: httpx.AsyncClient, upload: Any) -> None:
    await upload("red", b"1")
    for model in ("tiny-base", "red", "red"):
        await client.post(ROUTE, json={**CHAT, "model": model})
    found = await scrape(client)
    assert found["requests_total", "200", "red", ROUTE, "false"] == 2
    assert found["requests_total", "200", "base", ROUTE, "false"] == 1
    assert found["generated_tokens_total", "red"] == 6
    assert found["prompt_tokens_total", "base"] == len("u:canary-prompt\n")
    assert found["prompt_tokens_cached_total",] == 3
    assert found["finish_reasons_total", "stop"] == 3
    assert found["time_to_first_token_seconds_count", "base", "hot"] == 1
    assert found["time_to_first_token_seconds_count", "delta", "cold"] == 1
    assert found["time_to_first_token_seconds_count", "delta", "hot"] == 1
    assert found["inter_token_latency_seconds_count", "delta"] == 4
    assert found["time_per_output_token_seconds_count", "base"] == 1
    assert found["engine_queue_duration_seconds_sum",] == pytest.approx(0.75, abs=0.1)
    assert found["prefill_duration_seconds_sum", "delta"] == pytest.approx(1.5, abs=0.01)
    assert found["decode_duration_seconds_count", "base"] == 1
    assert found["request_prompt_tokens_count",] == found["request_generated_tokens_count",] == 3
    assert found["request_duration_seconds_count", "ok", ROUTE] == 3
    assert found["delta_resident", "red", "engine"] == found["delta_resident", "red", "ram"] == 1
    assert found["delta_slots_used", "engine"] == found["delta_slots_used", "ram"] == 1
    assert found["delta_slots", "engine"] == 2
    assert found["delta_resident_bytes", "engine"] == 1000
    assert found["delta_budget_bytes", "engine"] == float("inf")
    assert found["delta_budget_bytes", "ram"] == 1 << 30
    assert found["delta_resident_bytes", "ram"] == found["delta_disk_bytes",] == len(b"1")
    assert found["delta_registered", "active"] == 1
    assert found["delta_loads_total", "ok", "disk"] == 1
    assert found["delta_load_duration_seconds_count", "disk"] == 1
    assert found["delta_read_duration_seconds_count",] == 1
    assert found["delta_swap_duration_seconds_count", "cold"] == found["delta_swap_duration_seconds_count", "hot"] == 1
    assert found["delta_lookups_total", "hit"] == found["delta_lookups_total", "miss"] == 1
    assert found["delta_uploads_total", "created", "none"] == 1
    assert found["delta_upload_bytes_total",] == 1
    assert found["delta_upload_duration_seconds_count",] == 1
    assert found["admin_operations_total", "upload", "ok"] == 1
    assert found["store_free_bytes",] > 0


async def test_where_requests_are(client: httpx.AsyncClient, house: Any, upload: Any) -> None:
    await upload("red", b"1")
    house.engine.hold_loads, house.engine.block_at = True, 1
    asked = asyncio.create_task(client.post(ROUTE, json={**CHAT, "model": "red"}))

    async def until(phase: str) -> dict[tuple[str, ...], float]:
        while (found := await scrape(client))["requests_in_flight", phase] != 1:
            await asyncio.sleep(0.01)
        return found

    found = await until("loading_delta")
    assert found["queue_depth",] == 1
    joining = asyncio.create_task(client.post(ROUTE, json={**CHAT, "model": "red"}))
    while (await scrape(client))["delta_load_coalesced_total",] != 1:
        await asyncio.sleep(0.01)
    joining.cancel()
    await asyncio.gather(joining, return_exceptions=True)
    house.engine.hold_loads = False
    found = await until("decode")
    assert found["delta_requests_in_flight", "red"] == found["rows_in_flight",] == 1
    assert found["queue_depth",] == 0
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    found = await scrape(client)
    assert found["delta_requests_in_flight", "red"] == found["requests_in_flight", "decode"] == 0


async def test_refusals_errors_and_keys(client: httpx.AsyncClient, admin: httpx.AsyncClient, house: Any) -> None:
    before = await scrape(client)
    assert before["requests_rejected_total", "queue_full"] == 0
    assert before["request_errors_total", "engine_error", ROUTE] == before["auth_failures_total", "admin", "scope"] == 0
    assert before["admin_operations_total", "delete", "rejected"] == 0
    house.engine.fail_at = 1
    await client.post(ROUTE, json=CHAT)
    house.engine.fail_at = None
    with house.context.admission.permit(1000):
        await client.post(ROUTE, json=CHAT)
    await client.post(ROUTE, content=b"x" * 30_000)
    for key in ("", "Bearer nobody", API["authorization"]):
        await admin.get("/v1/admin/status", headers={"authorization": key})
    await client.post(ROUTE, json=CHAT, headers={"authorization": "Bearer nobody"})
    await admin.delete("/v1/admin/deltas/nobody")
    found = await scrape(client)
    assert found["request_errors_total", "engine_error", ROUTE] == 1
    assert found["finish_reasons_total", "error"] == 1
    assert found["requests_rejected_total", "queue_full"] == found["requests_rejected_total", "too_large"] == 1
    assert found["requests_rejected_total", "auth"] == 4
    assert found["auth_failures_total", "inference", "invalid"] == 1
    for reason in ("missing", "invalid", "scope"):
        assert found["auth_failures_total", "admin", reason] == 1
    assert found["admin_operations_total", "status", "rejected"] == 3
    assert found["admin_operations_total", "delete", "rejected"] == 1
    assert found["request_duration_seconds_count", "error", ROUTE] == 4


@pytest.mark.slow
async def test_o2_invented_names_make_no_series(house: Any, client: httpx.AsyncClient) -> None:
    """10,000 model names, straight into the application, and as many paths."""

    async def ask(method: str, path: str, body: bytes) -> None:
        sent = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            for message in sent:
                return message
            return await asyncio.Event().wait() and {}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                assert message["status"] == 404

        headers = [(b"authorization", API["authorization"].encode()), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}
        await house.app({**scope, "raw_path": path.encode(), "root_path": ""}, receive, send)

    async def flood(numbers: range) -> int:
        for number in numbers:
            await ask("POST", "/v1/completions", json.dumps({"model": f"m{number}", "prompt": "x"}).encode())
            if number % 10 == 0:
                await ask("GET", f"/{number}", b"")
                await ask("GET", f"/v1/models/{number}", b"")
        return len(await scrape(client))

    await scrape(client)  # its own series are there from now on
    few = await flood(range(10))
    assert await flood(range(10, 10_000)) == few
    found = await scrape(client)
    assert found["requests_total", "404", "none", "/v1/completions", "false"] == 10_000
    assert found["requests_total", "404", "none", "unmatched", "false"] == 1_000


async def test_delta_labels_are_bounded_and_forgotten() -> None:
    telemetry = Telemetry(CollectorRegistry())
    labels = {telemetry.labels.of(f"d{number}") for number in range(3 * MAX_DELTA_LABELS)}
    assert len(labels) == MAX_DELTA_LABELS + 1
    assert "other" in labels

    def series(name: str) -> list[str]:
        return [
            s.name for family in telemetry.registry.collect() for s in family.samples if s.labels.get("delta") == name
        ]

    decisions = Decisions(delta="d0", delta_digest="x", prompt_tokens=3)
    telemetry.record(Route("/r", "r"), Exchange("id", decisions), 200, 0.1)
    assert len(series("d0")) == 4
    telemetry.forget_delta("d0")
    assert series("d0") == []
    assert telemetry.labels.of("new") == "new"


async def test_a_name_that_nobody_uses_gives_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry, now = Telemetry(CollectorRegistry(), 2), 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    assert [telemetry.labels.of(name) for name in ("a", "b", "c")] == ["a", "b", "other"]
    now = IDLE_S
    assert [telemetry.labels.of(name) for name in ("b", "c", "a")] == ["b", "c", "other"]


async def test_a_deleted_delta_leaves_no_series(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, upload: Any
) -> None:
    await upload("red", b"1")
    await client.post(ROUTE, json={**CHAT, "model": "red"})
    assert any("red" in key for key in await scrape(client))
    await admin.delete("/v1/admin/deltas/red")
    found = await scrape(client)
    assert [key for key in found if "red" in key] == []
    assert found["delta_registered", "active"] == found["delta_slots_used", "engine"] == 0
    assert found["delta_evictions_total", "engine", "delete"] == found["delta_evictions_total", "ram", "delete"] == 1


async def test_o2_a_full_scrape_stays_small(build: Any, settings: Any, upload: Any) -> None:
    """More deltas than labels, each asked for streamed and not, and every way to be refused."""
    engine = settings.engine.model_copy(update={"max_resident_deltas": 100})
    house = build(settings=settings.model_copy(update={"engine": engine}))
    await house.gateway.start()
    for number in range(60):
        for stream in (False, True):
            exchange = Exchange("id", Decisions(delta=f"d{number}", delta_digest="x", prompt_tokens=1), stream)
            for route in (ROUTE, "/v1/completions"):
                house.context.telemetry.record(Route(route, "chat"), exchange, 200, 0.1)
    async with house.client() as client:
        for path in ("/v1/models", "/health/live", "/v1/admin/status", "/nowhere"):
            await client.get(path)
        assert len(await scrape(client)) < 3000
    await house.gateway.stop()


async def test_a_version_that_is_still_in_use_is_retired(client: httpx.AsyncClient, house: Any, upload: Any) -> None:
    await upload("red", b"1")
    house.engine.block_at = 1
    asked = asyncio.create_task(client.post(ROUTE, json={**CHAT, "model": "red"}))
    while not house.engine.running:
        await asyncio.sleep(0.01)
    assert (await scrape(client))["delta_retired_generations",] == 0
    await upload("red", b"2")
    assert (await scrape(client))["delta_retired_generations",] == 1
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    assert (await scrape(client))["delta_retired_generations",] == 0


async def test_a_load_soon_after_an_eviction_is_thrash(client: httpx.AsyncClient, upload: Any) -> None:
    for name in ("a", "b", "c"):
        await upload(name, name.encode())
    for name in ("a", "b", "c", "a"):
        await client.post(ROUTE, json={**CHAT, "model": name})
    found = await scrape(client)
    assert found["delta_evictions_total", "engine", "lru"] == 2
    assert found["delta_thrash_total",] == 1
    assert found["delta_lookups_total", "miss"] == 4
    assert found["delta_swap_duration_seconds_count", "warm"] == 1


async def test_metrics_while_loading_and_the_state(build: Any) -> None:
    house = build()
    async with house.client({}) as client:
        found = await scrape(client)
        assert {state: found["up_state", state] for state in State} == {state: state == "loading" for state in State}
        assert found["engine_up",] == 0
        assert found["model_info", "ba5e", "tiny-base", "float32"] == 1
        await house.gateway.start()
        found = await scrape(client)
        assert found["up_state", "ready"] == found["engine_up",] == 1
        house.engine.dead = True
        found = await scrape(client)
        assert (found["up_state", "engine_dead"], found["engine_up",]) == (1, 0)
        house.engine.dead = False
    await house.gateway.stop()


async def test_openmetrics_where_it_is_asked_for(client: httpx.AsyncClient) -> None:
    await client.post(ROUTE, json=CHAT)
    for path in ("/metrics", "/metrics/compat", "/metrics/engine"):
        response = await client.get(path, headers={"accept": "application/openmetrics-text; version=1.0.0"})
        assert response.headers["content-type"].startswith("application/openmetrics-text")
        assert response.text.endswith("# EOF\n")
        names = {family.name for family in open_families(response.text)}
        assert names or path == "/metrics/engine"
