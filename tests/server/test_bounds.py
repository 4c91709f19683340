"""Promises S6 and S8: everything that a client sends is bounded, and so is what it gets back; no number is taken that is none."""

import json
import time
from typing import Any

import httpx
import pytest

from server.wire import MAX_PROBLEMS

pytestmark = pytest.mark.anyio

MANY = 60_000
MESSAGE = {"role": "user", "content": "hi"}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def settings(settings: Any) -> Any:
    server = settings.server.model_copy(update={"max_body_bytes": 4 << 20})
    return settings.model_copy(update={"server": server})


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny-base", "messages": [MESSAGE], **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny-base", "prompt": "a", **fields}


def tool(name: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


JUNK = {
    "empty messages": (CHAT, chat(messages=[{}] * MANY)),
    "messages of numbers": (CHAT, chat(messages=[1] * MANY)),
    "content parts": (CHAT, chat(messages=[{"role": "user", "content": [{}] * MANY}])),
    "calls": (CHAT, chat(messages=[{"role": "assistant", "tool_calls": [{}] * MANY}])),
    "a role": (CHAT, chat(messages=[{"role": "x" * 1_000_000, "content": "hi"}])),
    "a tool's name": (CHAT, chat(tools=[tool("x" * 1_000_000)])),
    "tools": (CHAT, chat(tools=[{}] * MANY)),
    "good tools": (CHAT, chat(tools=[tool(f"f{i}") for i in range(10_000)])),
    "a tool choice": (
        CHAT,
        chat(tools=[tool("f")], tool_choice={"type": "function", "function": {"name": "x" * MANY}}),
    ),
    "a model": (CHAT, chat(model="x" * 1_000_000)),
    "prompts": (COMPLETIONS, completion(prompt=["a"] * MANY)),
    "prompts of ids": (COMPLETIONS, completion(prompt=[[1]] * MANY)),
    "mixed prompts": (COMPLETIONS, completion(prompt=["a", 1] * MANY)),
    "ids that are text": (COMPLETIONS, completion(prompt=[["a"] * MANY])),
    "stop strings": (CHAT, chat(stop=["x"] * MANY)),
    "stop numbers": (CHAT, chat(stop=[1] * MANY)),
    "stop ids": (CHAT, chat(stop_token_ids=[1] * MANY)),
    "unknown fields": (CHAT, chat(**{f"field{i}": i for i in range(MANY)})),
    "biases": (CHAT, chat(logit_bias={str(i): 1 for i in range(MANY)})),
    "a bias's key": (CHAT, chat(logit_bias={"x" * 1_000_000: 1})),
    "log-probabilities": (CHAT, chat(logprobs=True, top_logprobs=10**9)),
    "n": (CHAT, chat(n=10**9)),
    "n of prompts": (COMPLETIONS, completion(n=17)),
    "a cache salt": (CHAT, chat(cache_salt="x" * 1_000_000)),
    "a key of ours": (CHAT, chat(steering={"x" * 1_000_000: 1})),
    "keys of ours": (CHAT, chat(tool_gate={f"k{i}": 1 for i in range(MANY)})),
    "edits": (CHAT, chat(steering={"edits": [{}] * MANY})),
    "features": (CHAT, chat(steering={"edits": [{"sae": "s", "features": [{}] * MANY}]})),
    "deltas": (CHAT, chat(delta=[{"name": "a"}] * MANY)),
    "a schema": (CHAT, chat(response_format={"type": "json_schema", "json_schema": {"schema": {"$ref": "x" * MANY}}})),
    "choices": (CHAT, chat(structured_outputs={"choice": ["x"] * MANY})),
    "a regular expression": (CHAT, chat(structured_outputs={"regex": "x" * 1_000_000})),
    "tokens": ("/detokenize", {"tokens": ["x"] * MANY}),
}


@pytest.mark.parametrize("what", JUNK)
async def test_s6_much_junk_has_a_short_answer(client: httpx.AsyncClient, house: Any, what: str) -> None:
    path, body = JUNK[what]
    content = json.dumps(body).encode()
    begun = time.process_time()
    response = await client.post(path, content=content)
    assert time.process_time() - begun < 3
    assert response.status_code in (400, 404), response.text[:300]
    assert len(response.content) < 4000
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert not house.engine.calls
    assert house.idle()


@pytest.mark.parametrize(
    "body", [b"x" * 1_000_000, b'"' * 1_000_001, b"[" * 1_000_000, b'{"a":' * 200_000, b"[1," * 9_999]
)
async def test_s6_what_is_no_json_has_a_short_answer(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post(CHAT, content=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    assert len(response.content) < 500


async def test_s6_many_problems_are_told_in_part(client: httpx.AsyncClient) -> None:
    names = [
        *("temperature", "top_p", "top_k", "min_p", "n", "seed", "presence_penalty", "frequency_penalty", "min_tokens"),
        *("ignore_eos", "max_tokens", "stream", "cache_salt", "priority"),
    ]
    error = (await client.post(CHAT, json=chat(**{name: [] for name in names}))).json()["error"]
    assert len(error["message"]) <= 1000
    assert 1 < len(error["message"].split("; ")) <= MAX_PROBLEMS


async def test_s6_many_unknown_fields_are_tolerated(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=chat(**{f"field{i}": i for i in range(4000)}))
    assert response.status_code == 200


DEEP = "[" * 150 + "]" * 150
TEXTS = {
    "NaN": '"temperature": NaN',
    "Infinity": '"temperature": Infinity',
    "-Infinity": '"top_p": -Infinity',
    "1e400": '"temperature": 1e400',
    "a huge integer": f'"seed": 1{"0" * 400}',
    "a huger integer": f'"seed": 1{"0" * 5000}',
    "NaN where nobody reads": '"future": {"a": [NaN]}',
    "1e400 where nobody reads": '"future": {"a": [1e400]}',
    "true for 1": '"n": true',
    "true for 1.0": '"temperature": true',
    "true for a token": '"stop_token_ids": [true]',
    "5.0 for 5": '"n": 5.0',
    "a key twice": '"seed": 1, "seed": 2',
    "a key twice where nobody reads": '"future": {"a": 1, "a": 2}',
    "a key twice in an escape": '"se\\u0065d": 1, "seed": 2',
    "a key of ours twice": '"steering": {"profile": "a", "profile": "b", "direction": "use_context"}',
    "half a surrogate pair": '"user": "\\ud800"',
    "half a surrogate pair in a key": '"\\udc00": 1',
    "half a surrogate pair where it counts": '"stop": ["a\\ud800"]',
    "a schema without end": f'"tools": [{{"type": "function", "function": {{"name": "f", "parameters": {{"x": {DEEP}}}}}}}]',
    "depth": f'"future": {"[" * 300 + "]" * 300}',
    "a control character": '"user": "a\nb"',
    "a comment": '"seed": 1 /* one */',
    "a comma too many": '"seed": 1,',
}


@pytest.mark.parametrize("what", TEXTS)
async def test_s8_what_is_no_number_or_no_json_is_400(client: httpx.AsyncClient, house: Any, what: str) -> None:
    for path, start in ((CHAT, '"messages": [{"role": "user", "content": "hi"}]'), (COMPLETIONS, '"prompt": "a"')):
        if "tools" in TEXTS[what] and path == COMPLETIONS:
            continue
        body = f'{{"model": "tiny-base", {start}, {TEXTS[what]}}}'
        response = await client.post(path, content=body.encode())
        assert response.status_code == 400, response.text[:300]
        assert len(response.content) < 1500
    assert not house.engine.calls


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "latin-1"])
async def test_s8_other_encodings_are_400(client: httpx.AsyncClient, encoding: str) -> None:
    content = json.dumps(completion(prompt="é"), ensure_ascii=False).encode(encoding)
    response = await client.post(COMPLETIONS, content=content)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


async def test_s8_the_admin_plane_reads_as_strictly(admin: httpx.AsyncClient, upload: Any) -> None:
    digest = (await upload("red", b"1")).json()["digest"]
    good = f'"digest": "{digest}", "expected_generation": '
    for text in ("NaN", "true", "1.0", "1e400", '1, "expected_generation": 1', '1, "\\ud800": 1'):
        response = await admin.put("/v1/admin/deltas/red/alias", content=f"{{{good}{text}}}".encode())
        assert response.status_code == 400, text
    assert (await admin.put("/v1/admin/deltas/red/alias", content=f"{{{good}1}}".encode())).status_code == 200
