"""/tokenize, /detokenize, /tokenizer_info, /version and the aliases of liveness."""

from importlib import metadata
from typing import Any

import httpx
import pytest

from server.app import ROUTES

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "now"}}]


@pytest.mark.parametrize("root", ["", "/v1"])
async def test_there_and_back(client: httpx.AsyncClient, root: str) -> None:
    body = {"prompt": "aж", "add_special_tokens": False}
    found = (await client.post(f"{root}/tokenize", json=body)).json()
    assert found == {"count": 3, "max_model_len": 64, "tokens": list("aж".encode()), "token_strs": None}
    back = await client.post(f"{root}/detokenize", json={"model": "tiny-base", "tokens": found["tokens"]})
    assert back.json() == {"prompt": "aж"}
    told = (await client.post(f"{root}/tokenize", json={**body, "return_token_strs": True})).json()
    assert told["token_strs"][0] == "a"


async def test_chats_have_the_ids_that_are_answered(client: httpx.AsyncClient, house: Any) -> None:
    for tools in (None, TOOLS):
        body = {"messages": MESSAGES, "tools": tools}
        found = (await client.post("/tokenize", json=body)).json()["tokens"]
        assert (await client.post("/v1/chat/completions", json={"model": "tiny-base", **body})).status_code == 200
        assert house.engine.calls[-1][0] == found


async def test_no_text_has_no_tokens(client: httpx.AsyncClient) -> None:
    assert (await client.post("/tokenize", json={"prompt": ""})).json()["tokens"] == []
    assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": TOOLS}, "tools"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}, "add_generation_prompt"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "x"}, "chat_template"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [256]}, "tokens"),
    ],
)
async def test_bad_bodies(client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str) -> None:
    response = await client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_unknown_models_are_404(client: httpx.AsyncClient) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        response = await client.post(path, json={**body, "model": "nobody"})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_tokenizer_info_needs_its_setting(client: httpx.AsyncClient, build: Any, settings: Any) -> None:
    refused = await client.get("/tokenizer_info")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "route_not_found")
    server = settings.server.model_copy(update={"tokenizer_info": True})
    house = build(settings=settings.model_copy(update={"server": server}))
    async with house.client() as other:
        assert (await other.get("/tokenizer_info")).json()["eos_token"] == "\x00"


async def test_version(house: Any) -> None:
    async with house.client({}) as client:
        response = await client.get("/version")
    assert response.json() == {
        "version": metadata.version("deltaworks"),
        "git_sha": "unknown",
        "base": "tiny-base",
        "base_fingerprint": "sha256:ba5e",
    }


async def test_liveness_has_the_names_that_platforms_ask_for(house: Any) -> None:
    handlers = {(method, path): handler for _, method, path, handler in ROUTES}
    async with house.client({}) as client:
        for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
            assert (await client.request(method, path)).json() == {"status": "alive"}
            assert handlers[method, path] is handlers["GET", "/health/live"]
