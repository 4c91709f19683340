"""The operator's default steers every request that brings no steering of its own."""

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest

from server.config import Settings

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DEFAULT = {"profile": "house", "direction": "use_context", "strength": 1.25}


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny-base", "prompt": "abcdef", **fields}


@pytest.fixture
async def house(build: Callable[..., Any], settings: Settings) -> AsyncGenerator[Any, None]:
    steering = {"default": DEFAULT}
    house = build(settings=Settings.model_validate({**settings.model_dump(), "steering": steering}))
    await house.gateway.start()
    yield house
    await house.gateway.stop()


@pytest.fixture
async def strict(
    build: Callable[..., Any], settings: Settings, stocked: None
) -> AsyncGenerator[httpx.AsyncClient, None]:
    """A client of a server that lets nobody opt out."""
    steering = {"default": DEFAULT, "allow_opt_out": False}
    house = build(settings=Settings.model_validate({**settings.model_dump(), "steering": steering}))
    await house.gateway.start()
    async with house.client() as client:
        yield client
    await house.gateway.stop()


@pytest.fixture
async def stocked(upload: Any) -> None:
    late = {"probe": {"layer": 13, "threshold": 0.5, "auroc": 0.9}}
    profiles: list[tuple[str, dict[str, Any]]] = [("house", {}), ("other", {"model_name": "o"}), ("late", late)]
    for name, facts in profiles:
        assert (await upload(name, json.dumps(facts).encode(), "profiles")).status_code == 201


@pytest.mark.parametrize("stream", [False, True])
async def test_every_request_without_steering_gets_the_default(
    client: httpx.AsyncClient, house: Any, stocked: None, stream: bool
) -> None:
    messages = [{"role": "user", "content": "hi"}]
    for path, body in ((COMPLETIONS, text()), (CHAT, {"model": "tiny-base", "messages": messages})):
        response = await client.post(path, json={**body, "stream": stream})
        assert response.status_code == 200, response.text
        if not stream:
            shown = response.json()["gateway"]["steering"]
            assert (shown["applied"], shown["profile"], shown["strength"]) == (True, "house", 1.25)
    asked = (await client.post(COMPLETIONS, json=text(steering=DEFAULT))).json()["gateway"]["steering"]
    same = (await client.post(COMPLETIONS, json=text())).json()["gateway"]["steering"]
    assert asked == same  # one edit, so one cache key
    assert {edit.fingerprint for edit in house.engine.asked} == {same["fingerprint"].removeprefix("sha256:")}
    counted = 'deltaworks_steering_requests_total{mode="default",outcome="applied"} 3.0'
    assert counted in (await client.get("/metrics")).text


async def test_own_steering_and_policies_take_its_place(client: httpx.AsyncClient, house: Any, stocked: None) -> None:
    other = {"profile": "other", "direction": "use_parameter"}
    shown = (await client.post(COMPLETIONS, json=text(steering=other))).json()["gateway"]["steering"]
    assert (shown["profile"], shown["direction"]) == ("other", "use_parameter")
    house.engine.score = 0.1
    policy = {"policy": {"if_at_least": 0.5, "then": other}}
    for fields in ({}, {"steering": None}):
        shown = (await client.post(COMPLETIONS, json=text(conflict=policy, **fields))).json()["gateway"]["steering"]
        assert (shown["applied"], shown["profile"]) == (False, "other")


async def test_null_opts_out(client: httpx.AsyncClient, house: Any, stocked: None) -> None:
    body = (await client.post(COMPLETIONS, json=text(steering=None))).json()
    assert body["gateway"]["steering"] is None
    assert house.engine.asked == [None]


async def test_null_is_refused_where_nobody_may_opt_out(strict: httpx.AsyncClient) -> None:
    response = await strict.post(COMPLETIONS, json=text(steering=None))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", "steering")
    assert "steers every request" in error["message"]
    other = {"profile": "other", "direction": "use_parameter"}
    for fields in (
        {},
        {"steering": other},
        {"steering": None, "conflict": {"policy": {"if_at_least": 0, "then": other}}},
    ):
        assert (await strict.post(COMPLETIONS, json=text(**fields))).status_code == 200


async def test_score_is_asked_of_the_default_s_profile(client: httpx.AsyncClient, stocked: None) -> None:
    shown = (await client.post(COMPLETIONS, json=text(conflict={}))).json()["gateway"]
    assert (shown["conflict"]["score"], shown["steering"]["applied"]) == (0.5, True)
    response = await client.post(COMPLETIONS, json=text(conflict={"profile": "late"}))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "conflict")
    assert '"steering": null' in error["message"]
    alone = await client.post(COMPLETIONS, json=text(conflict={"profile": "late"}, steering=None))
    assert alone.json()["gateway"]["conflict"]["layer"] == 13


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (None, "there is no profile of that name"),
        ({"directions": {"use_parameter": {"layers": [1], "strength": 1}}}, "no such direction"),
        ({"base_fingerprint": "sha256:01d"}, "another base"),
    ],
)
async def test_default_that_cannot_be_used_is_no_fault_of_the_request(
    client: httpx.AsyncClient, house: Any, upload: Any, facts: dict[str, Any] | None, words: str
) -> None:
    if facts is not None:
        assert (await upload("house", json.dumps(facts).encode(), "profiles")).status_code == 201
    for fields in ({}, {"conflict": {}}):
        response = await client.post(COMPLETIONS, json=text(**fields))
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (503, "default_steering_unavailable", None)
        assert words in error["message"]
        assert '"steering": null' in error["message"]
    assert (await client.post(COMPLETIONS, json=text(steering=None))).status_code == 200
    counted = 'deltaworks_steering_requests_total{mode="default",outcome="failed"} 2.0'
    assert counted in (await client.get("/metrics")).text
    assert house.idle()


async def test_default_without_a_probe_cannot_score(client: httpx.AsyncClient, upload: Any) -> None:
    await upload("house", b'{"probe": null}', "profiles")
    error = (await client.post(COMPLETIONS, json=text(conflict={}))).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "conflict.profile")
