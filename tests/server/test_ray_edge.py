"""What stands around Ray Serve's proxies, without Ray: which delta a request is about, and what Ray Serve says in our words."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from server.cli import main
from server.ray import affinity
from server.ray.edge import SESSION, middlewares

pytestmark = pytest.mark.anyio

REPLICA = [(b"x-gateway-version", b"1"), (b"x-request-id", b"abc")]
Answer = Callable[[Callable[..., Awaitable[None]]], Awaitable[None]]


class Proxy:
    """Ray Serve's proxy as far as it matters: it adds its request id to request and answer, and remembers what came."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.session: str | None = None
        self.body = b""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["headers"] = [*scope["headers"], (b"x-request-id", b"abc")]
        self.session = next((value.decode() for name, value in scope["headers"] if name == SESSION), None)
        more = True
        while more:
            message = await receive()
            self.body += message.get("body", b"")
            more = message.get("more_body", False)
        await self._answer(send)


async def ask(answer: Answer, method: str, path: str, **sent: Any) -> tuple[httpx.Response, Proxy]:
    proxy = Proxy(answer)
    (around,) = middlewares()
    app = around.cls(proxy, *around.args, **around.kwargs)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://serve") as client:
        return await client.request(method, path, **sent), proxy


def answering(status: int, headers: list[tuple[bytes, bytes]], *bodies: bytes, ended: bool = True) -> Answer:
    async def answer(send: Callable[..., Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"x-request-id", b"abc")]})
        for i, body in enumerate(bodies):
            await send({"type": "http.response.body", "body": body, "more_body": not ended or i < len(bodies) - 1})

    return answer


async def nothing(send: Callable[..., Awaitable[None]]) -> None:
    """As Ray Serve does where a replica died before it answered."""


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ({"model": "tune"}, "tune"),
        ({"model": "tune@3"}, "tune"),
        ({"model": "base:tune@0123456789ab"}, "tune"),
        ({"model": "base", "delta": [{"name": "b", "weight": 0.5}, {"name": "a"}]}, "a+b"),
        ({"model": "base", "delta": []}, "base"),
        ({"model": "tune\r\nx-evil: 1"}, None),
        ({"model": ""}, None),
        ({"model": 3}, None),
        ({"model": "base", "delta": [3]}, None),
        ({"model": "base", "delta": "tune"}, None),
        ({}, None),
        ([{"model": "tune"}], None),
    ],
)
async def test_the_key_of_a_request_is_its_delta(body: Any, key: str | None) -> None:
    answer = answering(200, REPLICA, b"{}")
    response, proxy = await ask(answer, "POST", "/v1/completions", json=body)
    assert response.status_code == 200
    assert (proxy.session, json.loads(proxy.body)) == (key, body)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"model": "x", "prompt": "' + b"y" * (5 << 20)])
async def test_a_body_that_says_no_model_goes_on_as_it_came(body: bytes) -> None:
    response, proxy = await ask(answering(200, REPLICA, b"{}"), "POST", "/v1/chat/completions", content=body)
    assert (response.status_code, proxy.session) == (200, None)
    assert proxy.body == body


async def test_a_slow_body_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "_PEEK_S", 0.05)
    waiting = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b'{"model": '
        await waiting.wait()
        yield b'"tune"}'

    asyncio.get_running_loop().call_later(0.2, waiting.set)
    _, proxy = await ask(answering(200, REPLICA, b"{}"), "POST", "/v1/completions", content=slowly())
    assert (proxy.session, proxy.body) == (None, b'{"model": "tune"}')


@pytest.mark.parametrize(
    ("method", "path", "key"),
    [
        ("POST", "/v1/admin/deltas/tune/load", "tune"),
        ("GET", "/v1/admin/deltas/tune", "tune"),
        ("GET", "/v1/admin/deltas", None),
        ("GET", "/v1/models", None),
        ("GET", "/v1/admin/deltas/%00/load", None),
    ],
)
async def test_the_key_of_a_path_is_the_name_in_it(method: str, path: str, key: str | None) -> None:
    _, proxy = await ask(answering(200, REPLICA, b"{}"), method, path)
    assert proxy.session == key


async def test_a_replicas_answer_goes_out_as_it_is_with_one_request_id() -> None:
    response, _ = await ask(answering(404, REPLICA, b"a", b"b"), "GET", "/v1/models/x")
    assert (response.status_code, response.content) == (404, b"ab")
    assert response.headers.get_list("x-request-id") == ["abc"]


@pytest.mark.parametrize(
    ("answer", "code", "retry_after"),
    [
        (nothing, "replica_gone", "1"),
        (answering(503, [], b"no replica"), "replica_gone", "1"),
        (answering(500, [], b"ActorDiedError: /root/secret"), "replica_gone", "1"),
        (answering(404, [], b"Path '/v1/models' not found."), "loading", "5"),
    ],
)
async def test_what_ray_serve_says_is_said_in_our_words(answer: Answer, code: str, retry_after: str) -> None:
    response, _ = await ask(answer, "GET", "/v1/models")
    assert (response.status_code, response.json()["error"]["code"]) == (503, code)
    assert (response.headers["retry-after"], response.headers["x-request-id"]) == (retry_after, "abc")
    assert "secret" not in response.text


async def test_a_stream_that_breaks_off_ends_with_an_error_event() -> None:
    headers = [*REPLICA, (b"content-type", b"text/event-stream; charset=utf-8")]
    response, _ = await ask(answering(200, headers, b"data: 1\n\n", ended=False), "POST", "/v1/completions")
    first, error, done, rest = response.text.split("\n\n")
    assert (first, done, rest) == ("data: 1", "data: [DONE]", "")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "replica_gone"


async def test_any_other_answer_that_breaks_off_is_not_ended() -> None:
    sent: list[Any] = []
    (around,) = middlewares()
    app = around.cls(Proxy(answering(200, REPLICA, b"half", ended=False)), *around.args, **around.kwargs)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    await app({"type": "http", "method": "GET", "path": "/v1/models", "headers": []}, receive, send)
    assert [message.get("more_body") for message in sent] == [None, True]


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main(["ray"]) == 1
    assert "pip install 'deltaworks[ray]'" in capsys.readouterr().err


async def test_ray_serves_own_paths_are_left_to_it() -> None:
    response, _ = await ask(answering(200, [], b"success"), "GET", "/-/healthz")
    assert response.text == "success"
