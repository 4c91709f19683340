"""/metrics/compat: vLLM's names, for routers and boards that look for them."""

import time
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.engine.base import EngineStep

CHAT = {"model": "tiny-base", "messages": [{"role": "user", "content": "hello"}]}
pytestmark = pytest.mark.anyio

# What the routers' and boards' authors read.
NAMES = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:lora_requests_info": "gauge",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
}


async def scrape(client: httpx.AsyncClient) -> dict[str, Any]:
    response = await client.get("/metrics/compat", headers={"authorization": ""})
    assert response.status_code == 200
    return {family.name: family for family in text_string_to_metric_families(response.text)}


async def test_the_names_are_vllms_and_nothing_of_ours(client: httpx.AsyncClient) -> None:
    found = await scrape(client)
    assert {name: family.type for name, family in found.items()} == NAMES
    ours = (await client.get("/metrics")).text
    assert "vllm:" not in ours


async def test_the_numbers_are_ours(client: httpx.AsyncClient, house: Any, upload: Any) -> None:
    await upload("red", b"1")
    for model in ("tiny-base", "red"):
        await client.post("/v1/chat/completions", json={**CHAT, "model": model})
    house.engine.observe(EngineStep(running=3, waiting=2, kv_usage=0.25))
    found = await scrape(client)

    def value(name: str, **labels: str) -> float:
        (family,) = (family for family in found.values() if name.startswith(family.name))
        (sample,) = (s for s in family.samples if s.name == name and labels.items() <= s.labels.items())
        assert sample.labels["model_name"] == "tiny-base"
        return float(sample.value)

    assert value("vllm:num_requests_running") == 3
    assert value("vllm:num_requests_waiting") == 2
    assert value("vllm:kv_cache_usage_perc") == 0.25
    assert value("vllm:prompt_tokens_total") == 2 * len("u:hello\n")
    assert value("vllm:generation_tokens_total") == 6
    assert value("vllm:time_to_first_token_seconds_count") == value("vllm:e2e_request_latency_seconds_count") == 2
    assert value("vllm:time_to_first_token_seconds_bucket", le="640.0") == 2
    assert value("vllm:inter_token_latency_seconds_count") == 4
    assert value("vllm:request_success_total", finished_reason="stop") == 2
    assert value("vllm:request_success_total", finished_reason="abort") == 0


async def test_only_the_newest_set_of_adapters(client: httpx.AsyncClient, house: Any, upload: Any) -> None:
    digests = {name: (await upload(name, name.encode())).json()["digest"] for name in ("red", "blue", "green")}

    async def told(running: tuple[str, ...], waiting: tuple[str, ...]) -> dict[str, str]:
        sets = ({digests.get(name, name): 1 for name in names} for names in (running, waiting))
        house.engine.observe(EngineStep(4, 1, running_deltas=next(sets), waiting_deltas=next(sets)))
        (sample,) = (await scrape(client))["vllm:lora_requests_info"].samples
        assert sample.value == pytest.approx(time.time(), abs=5)
        labels: dict[str, str] = sample.labels
        return labels

    assert await told((), ()) == {"max_lora": "8", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    assert (await told(("red", "blue"), ("green",)))["running_lora_adapters"] == "blue,red"
    last = await told(("red", "a combination's digest"), ("blue",))
    assert (last["running_lora_adapters"], last["waiting_lora_adapters"]) == ("red", "blue")
