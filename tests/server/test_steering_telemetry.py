"""What steering leaves in the metrics and in the log line."""

import json
import logging
from dataclasses import replace
from typing import Any, get_args

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.decisions import SteeringMode, SteeringOutcome
from server.engine.base import EngineLoadError
from server.logs import JsonFormatter

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"
BY_PROFILE = {"profile": "knowledge", "direction": "use_context"}
BY_FEATURES = {"edits": [{"sae": "l13", "features": [{"id": 7, "op": "ablate"}]}]}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny-base", "prompt": "abc", **fields}


async def scrape(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


@pytest.fixture
async def stocked(upload: Any) -> None:
    assert (await upload("knowledge", b'{"model_name": "p"}', "profiles")).status_code == 201
    assert (await upload("l13", b"{}", "saes")).status_code == 201


async def test_modes_outcomes_and_sizes_are_counted(client: httpx.AsyncClient, house: Any, stocked: None) -> None:
    async def ask(status: int, **fields: Any) -> None:
        assert (await client.post(COMPLETIONS, json=body(**fields))).status_code == status

    policy = {"policy": {"if_at_least": 0.7, "then": BY_PROFILE}}
    await ask(200, steering=BY_PROFILE)
    await ask(200, steering=BY_PROFILE, conflict={})
    await ask(200, steering=BY_FEATURES)
    await ask(200, steering={**BY_PROFILE, "strength": 0})
    await ask(200, conflict={"profile": "knowledge"})
    await ask(200, conflict=policy)
    await ask(400, steering={**BY_PROFILE, "direction": "up"})
    await ask(404, steering={**BY_PROFILE, "profile": "nobody"})
    house.engine.spoil = lambda report: replace(report, applied=False)
    await ask(409, steering=BY_FEATURES)
    house.engine.edit_error = EngineLoadError("no")
    await ask(500, steering={**BY_PROFILE, "strength": 1.25})
    await ask(200)
    found = await scrape(client)
    counted = {key[1:]: value for key, value in found.items() if key[0] == "deltaworks_steering_requests_total"}
    assert len(counted) == len(get_args(SteeringMode)) * len(get_args(SteeringOutcome))
    assert {key: value for key, value in counted.items() if value} == {
        ("applied", "profile"): 2,
        ("applied", "features"): 1,
        ("no_op", "profile"): 1,
        ("score", "scored"): 1,
        ("policy", "unmet"): 1,
        ("profile", "rejected"): 2,
        ("failed", "features"): 1,
        ("failed", "profile"): 1,
    }
    assert found[("deltaworks_steering_feature_edits_count",)] == 6
    assert found[("deltaworks_steering_feature_edits_sum",)] == 30 + 30 + 1 + 30 + 1 + 30
    assert found[("deltaworks_steering_overhead_seconds_count",)] == 10
    assert 0 < found[("deltaworks_steering_overhead_seconds_sum",)] < 10
    assert found[("deltaworks_steering_edited_rows_total",)] == 2 + 2 + 1
    assert found[("deltaworks_steering_rel_norm_ratio_count",)] == 2 + 2 + 1
    assert found[("deltaworks_conflict_score_ratio_count",)] == 3
    assert found[("deltaworks_conflict_score_ratio_sum",)] == 1.5
    assert found[("deltaworks_edit_slots_used",)] == 1
    assert found[("deltaworks_edit_loads_total", "ok")] >= 4
    assert found[("deltaworks_edit_loads_total", "error")] == 1
    assert found[("deltaworks_edit_evictions_total", "lru")] >= 2
    assert found[("deltaworks_edit_load_duration_seconds_count",)] == found[("deltaworks_edit_loads_total", "ok")]


async def test_names_and_features_make_no_series(client: httpx.AsyncClient, house: Any, upload: Any) -> None:
    async def flood(tag: str) -> int:
        for number in range(10):
            assert (await upload(f"{tag}{number}", json.dumps({"model_name": tag}).encode(), "profiles")).is_success
            steering = {"profile": f"{tag}{number}", "direction": "use_context", "strength": number / 10}
            assert (await client.post(COMPLETIONS, json=body(steering=steering))).status_code == 200
            steering["profile"] = f"unknown-{tag}{number}"
            assert (await client.post(COMPLETIONS, json=body(steering=steering))).status_code == 404
        return len(await scrape(client))

    await flood("a")
    assert await flood("b") == await flood("c")


async def test_log_line_tells_the_edit_and_no_prompt(
    client: httpx.AsyncClient, stocked: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="deltaworks.request"):
        sent = body(prompt="canary", steering={**BY_PROFILE, "strength": 1.5}, conflict={})
        shown = (await client.post(COMPLETIONS, json=sent)).json()["gateway"]["steering"]
        await client.post(COMPLETIONS, json=body())
    steered, plain = (json.loads(JsonFormatter().format(record)) for record in caplog.records)
    said = steered["steering"]
    assert said.pop("overhead_s") > 0
    assert said == {
        "mode": "profile",
        "outcome": "applied",
        "profile": "knowledge",
        "profile_digest": shown["profile_digest"],
        "direction": "use_context",
        "strength": 1.5,
        "fingerprint": shown["fingerprint"].removeprefix("sha256:"),
        "features": 30,
        "edited_rows": 2,
        "rel_norm": 0.25,
        "conflict_score": 0.5,
    }
    assert steered["warnings"] == []
    assert "canary" not in json.dumps(steered)
    assert "steering" not in plain
