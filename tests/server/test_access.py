"""Who may do what: scopes on every route, deltas per key, limits per key."""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from server.app import ADMIN, INFERENCE, PUBLIC, ROUTES, SplitApp
from server.auth import require_admin, require_inference
from server.config import Settings
from server.keys import hash_key
from server.routes.query import known_fields

pytestmark = pytest.mark.anyio

ADMIN_PORT = 9000
CHAT = {"model": "tiny-base", "messages": [{"role": "user", "content": "hi"}]}


def keys(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"keys": [{"hash": hash_key(f"{entry['id']}-key"), **entry} for entry in entries], "admin_keys": "admin-key"}


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}-key"}


@pytest.fixture
async def shared(build: Callable[..., Any], settings: Settings) -> AsyncGenerator[Any, None]:
    """A house with keys for two teams, one with limits, and one that may do both."""
    auth = keys(
        {"id": "red", "deltas": ["red", "shared-*"]},
        {"id": "blue", "deltas": ["blue"]},
        {"id": "none", "deltas": []},
        {"id": "both", "scopes": ["inference", "admin"]},
        {"id": "operator", "scopes": ["admin"]},
        {"id": "small", "max_concurrent": 2, "max_queued_tokens": 40},
        {"id": "slow", "requests_per_minute": 2},
    )
    house = build(settings=settings.model_copy(update={"auth": type(settings.auth).model_validate(auth)}))
    await house.gateway.start()
    yield house
    await house.gateway.stop()


@pytest.fixture
async def ask(shared: Any) -> AsyncGenerator[Callable[..., Any], None]:
    async with shared.client({}) as client:

        async def ask(name: str, model: str = "tiny-base", **fields: Any) -> httpx.Response:
            body = {"model": model, "prompt": "a", **fields}
            return await client.post("/v1/completions", json=body, headers=bearer(name))

        yield ask


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


# vLLM's paths, where controllers ask for them; they take an admin key here.
OF_CONTROLLERS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


TABLE = {(method, path): access for access, method, path, _ in ROUTES}


def served(app: FastAPI) -> set[tuple[str, str]]:
    """Methods and paths, each classified and guarded; also where a route did not come through the table."""
    guards = {PUBLIC: [], INFERENCE: [require_inference], ADMIN: [require_admin, known_fields]}
    found = set()
    for route in app.routes:
        assert isinstance(route, APIRoute), f"{route} is none of ours"
        for method in route.methods:
            assert (method, route.path) in TABLE, f"{method} {route.path} is not classified"
            access = TABLE[method, route.path]
            assert [depends.dependency for depends in route.dependencies] == guards[access]
            of_admins = route.path.startswith("/v1/admin") or route.path in OF_CONTROLLERS
            assert (access == ADMIN) == of_admins
            found.add((method, route.path))
    return found


async def test_s4_every_route_is_classified_and_guarded_as_its_class_says(shared: Any) -> None:
    assert len(TABLE) == len(ROUTES)
    assert served(shared.app) == set(TABLE)


async def test_s4_on_two_ports_every_route_is_where_it_belongs(shared: Any) -> None:
    split = SplitApp(shared.context, shared.app.state.keys, ADMIN_PORT)
    plane = {route for route in TABLE if route[1].startswith("/v1/admin/")}
    public = {route for route, access in TABLE.items() if access == PUBLIC}
    assert served(split.admin) == plane | public
    assert served(split.rest) == set(TABLE) - plane


@pytest.mark.parametrize("port", [8000, ADMIN_PORT])
async def test_s4_both_ports_refuse_in_the_same_shape_and_within_the_same_bounds(shared: Any, port: int) -> None:
    """The routes of the other port, nonsense, too much, a crash: few words, and an id."""
    split = SplitApp(shared.context, shared.app.state.keys, ADMIN_PORT)
    here, there = (split.admin, split.rest) if port == ADMIN_PORT else (split.rest, split.admin)
    lost = [*(served(there) - served(here)), ("GET", "/nowhere"), ("GET", "//v1/admin/status"), ("GET", "/metrics/")]
    post = ("PUT", "/v1/admin/deltas/x/alias") if port == ADMIN_PORT else ("POST", "/v1/completions")
    asked: list[tuple[tuple[int, str], tuple[str, str], dict[str, Any]]] = [
        *(((404, "route_not_found"), route, {"headers": {"host": f"x:{ADMIN_PORT}"}}) for route in lost),
        ((405, "method_not_allowed"), ("PATCH", "/version"), {}),
        ((413, "body_too_large"), post, {"content": b" " * 30_000}),
        ((400, "invalid_json"), post, {"content": b"[" * 10_000}),
        ((401, "missing_api_key"), post, {"headers": {"authorization": ""}}),
        ((500, "internal_error"), ("GET", "/metrics"), {}),
    ]
    shared.store.nbytes = None  # a scrape reads it
    transport = httpx.ASGITransport(app=split, raise_app_exceptions=False)
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(transport=transport, base_url=url, headers=bearer("both")) as client:
        for expected, (method, path), fields in asked:
            response = await client.request(method, re.sub(r"{[^}]*}", "x", path), **fields)
            assert code(response) == expected, path
            assert len(response.content) < 1000
            assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


@pytest.mark.parametrize(
    ("authorization", "inference", "admin"),
    [
        (None, (401, "missing_api_key"), (401, "missing_api_key")),
        ("", (401, "missing_api_key"), (401, "missing_api_key")),
        ("Bearer", (401, "missing_api_key"), (401, "missing_api_key")),
        ("Basic red-key", (401, "missing_api_key"), (401, "missing_api_key")),
        ("Bearer nope", (401, "invalid_api_key"), (401, "invalid_api_key")),
        ("Bearer RED-KEY", (401, "invalid_api_key"), (401, "invalid_api_key")),
        (f"Bearer {hash_key('both-key')}", (401, "invalid_api_key"), (401, "invalid_api_key")),
        ("bearer red-key", None, (403, "insufficient_scope")),
        ("Bearer operator-key", (403, "insufficient_scope"), None),
        ("Bearer both-key", None, None),
        ("Bearer admin-key", None, None),
    ],
)
async def test_s3_every_route_with_every_kind_of_key(
    shared: Any, authorization: str | None, inference: tuple[int, str] | None, admin: tuple[int, str] | None
) -> None:
    """On one port, and with the admin plane on another."""
    split = SplitApp(shared.context, shared.app.state.keys, ADMIN_PORT)
    headers = {} if authorization is None else {"authorization": authorization}
    transport = httpx.ASGITransport(app=split, raise_app_exceptions=False)
    async with shared.client(headers) as one, httpx.AsyncClient(transport=transport, headers=headers) as two:
        for access, method, path, _ in ROUTES:
            port = ADMIN_PORT if path.startswith("/v1/admin/") else 8000
            path = re.sub(r"{[^}]*}", "x", path)
            response = await one.request(method, path)
            split_off = await two.request(method, f"http://gateway:{port}{path}")
            assert split_off.status_code == response.status_code
            assert response.status_code < 400 or split_off.json() == response.json()
            refusal = {PUBLIC: None, INFERENCE: inference, ADMIN: admin}[access]
            if refusal is None:
                assert response.status_code not in (401, 403), path
            else:
                assert code(response) == refusal, path
                assert (response.headers.get("www-authenticate") == "Bearer") == (refusal[0] == 401)


@pytest.mark.parametrize("auth", [{}, {"api_keys": "user-key"}])
async def test_s3_without_an_admin_key_the_admin_plane_is_closed(build: Callable[..., Any], auth: Any) -> None:
    house = build(settings=Settings.model_validate({"auth": auth}))
    await house.gateway.start()
    for key in ("user-key", "whatever"):
        async with house.client({"authorization": f"Bearer {key}"}) as client:
            for access, method, path, _ in ROUTES:
                if access == ADMIN:
                    response = await client.request(method, re.sub(r"{[^}]*}", "x", path))
                    assert code(response) == (403, "admin_disabled"), path
            answered = (await client.post("/v1/chat/completions", json=CHAT)).status_code
            assert answered == (401 if auth and key == "whatever" else 200)
    await house.gateway.stop()


async def test_s5_a_delta_of_somebody_else_is_not_there(shared: Any, ask: Any) -> None:
    """404 with the very words of a name that nobody has, also as a part of a combination, and missing in the list."""
    async with shared.client(bearer("both")) as admin:
        for name in ("red", "blue", "shared-1"):
            query = {"name": name, "sha256": hash_key(name).removeprefix("sha256:")}
            assert (await admin.post("/v1/admin/deltas", params=query, content=name)).status_code == 201
        seen = {}
        for name in ("red", "blue", "none", "both"):
            listed = (await admin.get("/v1/models", headers=bearer(name))).json()["data"]
            seen[name] = [card["id"] for card in listed]
            for model in ("red", "blue", "shared-1"):
                one = await admin.get(f"/v1/models/{model}", headers=bearer(name))
                assert (one.status_code == 200) == (model in seen[name])
    assert seen == {
        "red": ["tiny-base", "red", "shared-1"],
        "blue": ["tiny-base", "blue"],
        "none": ["tiny-base"],
        "both": ["tiny-base", "blue", "red", "shared-1"],
    }
    for name, models in seen.items():
        for model in ("tiny-base", "red", "blue", "shared-1"):
            assert ((await ask(name, model)).status_code == 200) == (model in models)
            if model != "tiny-base":
                for form in (f"tiny-base:{model}", f"{model}@1", f"tiny-base:{model}@1"):
                    assert ((await ask(name, form)).status_code == 200) == (model in models)
            combined = await ask(name, delta=[{"name": model}]) if model != "tiny-base" else None
            assert combined is None or (combined.status_code == 200) == (model in models)
    assert (await ask("blue", "red")).json() == (await ask("blue", "nobody")).json()
    parts = [{"name": "blue", "weight": 0.5}, {"name": "red"}]
    hidden, absent = await ask("blue", delta=parts), await ask("blue", delta=[parts[0], {"name": "nobody"}])
    assert (code(hidden), hidden.json()) == ((404, "model_not_found"), absent.json())
    assert shared.idle()


async def test_rows_of_a_key_are_429_and_those_of_others_go_on(shared: Any, ask: Any) -> None:
    shared.engine.block_at = 1
    running = [asyncio.create_task(ask("small")) for _ in range(2)]
    await asyncio.sleep(0.05)
    assert len(shared.engine.running) == 2
    shared.engine.block_at = None
    refused = await ask("small")
    assert code(refused) == (429, "tenant_concurrency_exceeded")
    assert refused.headers["retry-after"] == "1"
    assert 0 < int(refused.headers["retry-after-ms"]) <= 1000
    assert "x-should-retry" not in refused.headers
    assert (await ask("red")).status_code == 200
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    assert (await ask("small")).status_code == 200
    never = await ask("small", n=3, temperature=1)
    assert code(never) == (400, "invalid_value")
    assert shared.idle()


@asynccontextmanager
async def waiting(shared: Any, ask: Any) -> AsyncGenerator[None, None]:
    """A prompt of 30 tokens by the key `small`, which waits for its first one inside."""
    shared.engine.block_at = 0
    running = asyncio.create_task(ask("small", prompt="a" * 30))
    while not shared.engine.running:
        await asyncio.sleep(0)
    shared.engine.block_at = None
    yield
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_prompt_tokens_of_a_key_are_429_while_they_wait(shared: Any, ask: Any) -> None:
    async with waiting(shared, ask):
        refused = await ask("small", prompt="a" * 11)
        assert code(refused) == (429, "rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await ask("small", prompt="a" * 10)).status_code == 200
        assert code(await ask("small", prompt="a" * 41)) == (400, "invalid_value")
    assert (await ask("small", prompt="a" * 11)).status_code == 200
    assert shared.idle()


def left(response: httpx.Response, what: str) -> tuple[int, int, float]:
    """Limit, remaining, and the seconds to the reset, as OpenAI's headers tell them."""
    limit, remaining, reset = (response.headers[f"x-ratelimit-{of}-{what}"] for of in ("limit", "remaining", "reset"))
    assert reset.endswith("ms")
    return int(limit), int(remaining), int(reset.removesuffix("ms")) / 1000


async def test_a_limited_key_is_told_what_it_has_left(shared: Any, ask: Any) -> None:
    """What the headers say remains is what is let in, also on the answer that refuses, and in a stream before its first event."""
    for remaining, reset_s in ((1, 30), (0, 60)):
        told = left(await ask("slow", stream=bool(remaining)), "requests")
        assert told == (2, remaining, pytest.approx(reset_s, abs=3))
    refused = await ask("slow")
    assert (code(refused)[0], left(refused, "requests")[:2]) == (429, (2, 0))
    asked = left(refused, "requests")[2] - int(refused.headers["retry-after-ms"]) / 1000
    assert asked == pytest.approx(30, abs=0.1)  # the next one is due when one of two has been forgotten
    async with shared.client(bearer("slow")) as client:
        assert left(await client.get("/v1/models"), "requests")[:2] == (2, 0)  # which costs nothing

    async with waiting(shared, ask):
        refused = await ask("small", prompt="a" * 11)
        limit, remaining, reset_s = left(refused, "tokens")
        assert (limit, remaining) == (40, 10)
        assert reset_s > 0
        assert "x-ratelimit-limit-requests" not in refused.headers
    assert left(await ask("small", prompt="a" * 40), "tokens") == (40, 40, 0)
    for name in ("red", "both", "nobody"):
        assert not [header for header in (await ask(name)).headers if header.startswith("x-ratelimit")]


async def test_requests_a_minute_are_429_with_the_time_until_the_next(shared: Any, ask: Any) -> None:
    assert [(await ask("slow")).status_code for _ in range(2)] == [200, 200]
    refused = await ask("slow")
    assert code(refused) == (429, "rate_limit_exceeded")
    assert 25 < int(refused.headers["retry-after-ms"]) / 1000 <= 30
    assert refused.headers["retry-after"] == "30"
    assert (await ask("red")).status_code == 200
