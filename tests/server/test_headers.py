"""Headers that every answer has, and signs of life in streams that are silent."""

import re
from typing import Any

import httpx
import pytest

from server.build import installed

CHAT = {"model": "tiny-base", "messages": [{"role": "user", "content": "hi"}]}
API = {"authorization": "Bearer user-key"}


@pytest.mark.anyio
async def test_every_answer_names_request_and_gateway(client: httpx.AsyncClient, house: Any) -> None:
    async def asked(status: int, method: str, path: str, **fields: Any) -> httpx.Response:
        response = await client.request(method, path, **fields)
        assert response.status_code == status
        assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
        assert response.headers["x-gateway-version"] == installed().version
        return response

    for status, method, path, fields in (
        (200, "GET", "/health/live", {}),
        (200, "GET", "/metrics", {}),
        (404, "GET", "/nothing", {}),
        (405, "GET", "/v1/completions", {}),
        (401, "GET", "/v1/models", {"headers": {"authorization": "Bearer nobody"}}),
        (403, "GET", "/v1/admin/status", {}),
        (400, "POST", "/v1/completions", {"content": b"{"}),
        (404, "POST", "/v1/chat/completions", {"json": {**CHAT, "model": "nobody"}}),
        (413, "POST", "/v1/completions", {"content": b" " * 30_000}),
    ):
        assert "x-delta-id" not in (await asked(status, method, path, **fields)).headers
    await asked(200, "POST", "/v1/chat/completions", json={**CHAT, "stream": True})
    house.engine.words = None  # makes the fake engine crash with a TypeError
    await asked(500, "POST", "/v1/chat/completions", json=CHAT)


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_answers_name_their_delta_and_its_waits(client: httpx.AsyncClient, upload: Any, stream: bool) -> None:
    await upload("red", b"red")
    for model, delta, version in (("red", "red", "1"), ("tiny-base", "base", None)):
        response = await client.post("/v1/chat/completions", json={**CHAT, "model": model, "stream": stream})
        assert (response.headers["x-delta-id"], response.headers.get("x-delta-version")) == (delta, version)
        for wait in ("x-queue-time-ms", "x-swap-time-ms"):
            assert 0 <= float(response.headers[wait]) < 10_000


@pytest.mark.anyio
async def test_streams_are_not_to_be_held_back(client: httpx.AsyncClient) -> None:
    headers = (await client.post("/v1/chat/completions", json={**CHAT, "stream": True})).headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
    assert "content-length" not in headers


@pytest.mark.parametrize("settings", [0.05], indirect=True)
def test_a_silent_stream_shows_signs_of_life(live: Any) -> None:
    live.house.engine.block_at = 2
    body = {**CHAT, "stream": True}
    with httpx.stream("POST", f"{live.url}/v1/chat/completions", json=body, headers=API, timeout=5) as response:
        received = b""
        for chunk in response.iter_raw():
            received += chunk
            if received.count(b": keep-alive\n\n") == 3:
                break
    told, _, alive = received.partition(b": keep-alive")
    assert told.count(b"data: ") == 3  # the role, and two words
    assert b"data: " not in alive
    assert live.wait_idle()


@pytest.mark.parametrize("settings", [0, 60], indirect=True)
def test_a_stream_that_talks_has_no_comments(live: Any) -> None:
    body = {**CHAT, "stream": True}
    response = httpx.post(f"{live.url}/v1/chat/completions", json=body, headers=API, timeout=5)
    assert all(line.startswith("data: ") for line in response.text.split("\n\n") if line)


@pytest.fixture
def settings(request: pytest.FixtureRequest, settings: Any) -> Any:
    if not hasattr(request, "param"):
        return settings
    server = settings.server.model_copy(update={"keep_alive_s": request.param})
    return settings.model_copy(update={"server": server})


@pytest.mark.anyio
async def test_s9_no_page_of_another_origin_is_let_in(house: Any) -> None:
    """A browser asks first, and sends with the page's origin; it is told nothing that would let it go on."""
    page = {"origin": "https://evil.example", "sec-fetch-mode": "cors"}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}
    async with house.client({}) as client:
        for path in ("/v1/chat/completions", "/v1/models", "/v1/admin/deltas", "/metrics", "/health/live", "/nowhere"):
            preflight = await client.options(
                path, headers={**page, **asked, "access-control-request-private-network": "true"}
            )
            assert preflight.status_code == (404 if path == "/nowhere" else 405)
            simple = await client.get(path, headers={**page, **API})
            sent = await client.post(path, json=CHAT, headers={**page, **API})
            for response in (preflight, simple, sent):
                assert not [name for name in response.headers if name.startswith(("access-control-", "timing-allow"))]
