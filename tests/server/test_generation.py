"""The two generation endpoints, folded and streamed, over the fake engine."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny-base", "messages": [{"role": "user", "content": "hi"}], **fields}


def frames(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_chat_answer_has_text_usage_and_what_was_decided(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=chat())
    body = response.json()
    assert response.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny-base"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "base one two"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt_tokens = len("u:hi\n")
    assert body["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 3,
        "total_tokens": prompt_tokens + 3,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert body["gateway"]["delta"] is None
    assert 0 < body["gateway"]["timings"]["ttft_s"] <= body["gateway"]["timings"]["total_s"]
    assert body["system_fingerprint"].startswith("fp_")


async def test_model_chooses_the_delta(client: httpx.AsyncClient, upload: Any, house: Any) -> None:
    digests = {name: (await upload(name, name.encode())).json()["digest"] for name in ("red", "blue")}
    seen = {}
    for name in ("red", "blue", "tiny-base"):
        body = (await client.post(CHAT, json=chat(model=name))).json()
        seen[name] = body
    assert seen["red"]["choices"][0]["message"]["content"] == f"{digests['red'][:6]} one two"
    assert seen["blue"]["gateway"]["delta_digest"] == digests["blue"]
    assert seen["blue"]["gateway"]["delta"] == "blue"
    assert seen["tiny-base"]["choices"][0]["message"]["content"] == "base one two"
    assert len({body["system_fingerprint"] for body in seen.values()}) == 3
    assert house.idle()


async def test_stream_is_role_content_finish_usage_done(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=chat(stream=True, stream_options={"include_usage": True}))
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    *chunks, done = frames(response)
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["choices"][0]["delta"].get("content") for c in chunks[1:4]] == ["base", " one", " two"]
    assert chunks[4]["choices"][0]["delta"] == {}
    assert [c["choices"][0]["finish_reason"] for c in chunks[:5]] == [None, None, None, None, "stop"]
    assert [c["usage"] for c in chunks[:5]] == [None] * 5
    assert chunks[5]["choices"] == []
    assert chunks[5]["usage"]["completion_tokens"] == 3
    assert chunks[5]["gateway"]["delta_digest"] is None
    assert len(chunks) == 6
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1


async def test_stream_without_usage_ends_with_the_finish_chunk(client: httpx.AsyncClient) -> None:
    *chunks, done = frames(await client.post(CHAT, json=chat(stream=True, n=2)))
    assert done == "[DONE]"
    assert sorted(c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]) == [0, 1]
    assert all("usage" not in c for c in chunks)
    assert "gateway" in chunks[-1]
    assert all("gateway" not in c for c in chunks[:-1])


async def test_completion_takes_text_ids_and_lists_of_both(client: httpx.AsyncClient, house: Any) -> None:
    for prompt, ids in (
        ("ab", [[97, 98]]),
        (["a", "bc"], [[97], [98, 99]]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ):
        house.engine.calls.clear()
        body = (await client.post(COMPLETIONS, json={"model": "tiny-base", "prompt": prompt, "n": 2})).json()
        assert [call[0] for call in house.engine.calls] == ids
        assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(ids)))
        assert {choice["text"] for choice in body["choices"]} == {"base one two"}
        assert body["usage"]["prompt_tokens"] == sum(map(len, ids))
        assert body["usage"]["completion_tokens"] == 6 * len(ids)
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == len(ids)


async def test_completion_stream_of_two_prompts(client: httpx.AsyncClient, house: Any) -> None:
    body = {"model": "tiny-base", "prompt": ["a", "b"], "stream": True}
    *chunks, done = frames(await client.post(COMPLETIONS, json=body))
    assert done == "[DONE]"
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "base one two", 1: "base one two"}
    assert house.idle()


async def test_logprobs_in_both_shapes(client: httpx.AsyncClient) -> None:
    content = (await client.post(CHAT, json=chat(logprobs=True, top_logprobs=1))).json()["choices"][0]["logprobs"][
        "content"
    ]
    assert [token["token"] for token in content] == ["base", " one", " two"]
    assert content[0] == {
        "token": "base",
        "logprob": -0.5,
        "bytes": [98, 97, 115, 101],
        "top_logprobs": [{"token": "x", "logprob": -9999.0, "bytes": [120]}],
    }
    body = (await client.post(COMPLETIONS, json={"model": "tiny-base", "prompt": "a", "logprobs": 1})).json()
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["base", " one", " two"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{"x": -9999.0, token: -0.5} for token in ("base", " one", " two")],
        "text_offset": [0, 4, 8],
    }
    streamed = frames(
        await client.post(COMPLETIONS, json={"model": "tiny-base", "prompt": "a", "logprobs": 1, "stream": True})
    )
    assert [c["choices"][0]["logprobs"]["text_offset"] for c in streamed[:-1]] == [[0], [4], [8]]


async def test_sampling_fields_reach_the_engine(client: httpx.AsyncClient, house: Any) -> None:
    fields = {
        "temperature": 0,
        "top_p": 0.5,
        "seed": 7,
        "stop": "x",
        "n": 2,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "max_completion_tokens": 2,
        "max_tokens": 9,
        "cache_salt": "tenant",
        "top_k": 5,
    }
    body = (await client.post(CHAT, json=chat(**fields))).json()
    _, sampling, _, salt = house.engine.calls[0]
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.stop, sampling.n) == (0, 0.5, 7, ("x",), 2)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.top_k) == (1, -1.5, 5)
    assert sampling.max_tokens == 2
    assert salt == "tenant"
    assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}


async def test_no_limit_means_what_the_context_leaves(client: httpx.AsyncClient, house: Any) -> None:
    await client.post(CHAT, json=chat())
    assert house.engine.calls[0][1].max_tokens == 64 - len("u:hi\n")


async def test_nulls_and_unknown_openai_fields_are_tolerated(client: httpx.AsyncClient) -> None:
    fields = dict.fromkeys(("temperature", "stop", "n", "seed", "max_tokens", "stream", "logprobs", "tools"))
    response = await client.post(CHAT, json=chat(**fields, store=True, some_future_field={"a": 1}))
    assert response.status_code == 200


async def test_text_parts_and_developer_role(client: httpx.AsyncClient, house: Any) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "d"}, {"role": "user", "content": parts}]
    assert (await client.post(CHAT, json=chat(messages=messages))).status_code == 200
    assert bytes(house.engine.calls[0][0]) == b"s:d\nu:ab\n"


BAD_FIELDS = [
    ({"temperature": 3}, "invalid_value", "temperature"),
    ({"temperature": "1"}, "invalid_value", "temperature"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"max_tokens": True}, "invalid_value", "max_tokens"),
    ({"max_tokens": 5.0}, "invalid_value", "max_tokens"),
    ({"n": 17}, "invalid_value", "n"),
    ({"seed": 1 << 63}, "invalid_value", "seed"),
    ({"stop": [""]}, "invalid_value", "stop"),
    ({"stop": ["x"] * 17}, "invalid_value", "stop"),
    ({"messages": []}, "invalid_value", "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_value", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_value", "messages"),
    ({"top_logprobs": 2}, "invalid_value", None),
    ({"stream_options": {"include_usage": True}}, "invalid_value", None),
    ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
    ({"best_of": 2, "use_beam_search": True}, "unsupported_parameter", "use_beam_search"),
    ({"max_tokens": 60}, "context_length_exceeded", "max_tokens"),
    ({"messages": [{"role": "user", "content": "x" * 64}]}, "context_length_exceeded", "messages"),
    ({"model": 5}, "invalid_value", "model"),
]


@pytest.mark.parametrize(("fields", "code", "param"), BAD_FIELDS)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_field_is_400_before_anything_runs(
    client: httpx.AsyncClient, house: Any, fields: dict[str, Any], code: str, param: str | None, stream: bool
) -> None:
    # stream_options is only wrong without stream
    if stream and "stream_options" in fields:
        return
    response = await client.post(
        CHAT, json=chat(stream=stream, **fields) if "messages" not in fields else {**chat(stream=stream), **fields}
    )
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)
    assert error["type"] == "invalid_request_error"
    assert not house.engine.calls
    assert house.idle()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "tiny-base", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 10_000,
        b'{"seed": ' + b"9" * 5000 + b"x}",
        b"\xff\xfe",
    ],
)
async def test_what_is_not_json_is_400(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    assert len(response.content) < 2000


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400", "9" * 4000])
async def test_numbers_that_are_none_are_400(client: httpx.AsyncClient, number: str) -> None:
    text = json.dumps(chat(temperature=0)).replace('"temperature": 0', f'"temperature": {number}')
    response = await client.post(CHAT, content=text.encode())
    assert response.status_code == 400
    assert len(response.content) < 2000


async def test_missing_parameter(client: httpx.AsyncClient) -> None:
    error = (await client.post(CHAT, json={"messages": []})).json()["error"]
    assert (error["code"], error["param"]) == ("missing_parameter", "model")


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], [-1], [256], [1, "a"], [["a"]], ["a"] * 65])
async def test_bad_prompt_is_400(client: httpx.AsyncClient, house: Any, prompt: Any) -> None:
    response = await client.post(COMPLETIONS, json={"model": "tiny-base", "prompt": prompt})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    assert house.idle()


async def test_unknown_model_is_404_and_lists_nothing(client: httpx.AsyncClient, upload: Any, house: Any) -> None:
    await upload("secret-name", b"x")
    response = await client.post(CHAT, json=chat(model="nobody"))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "secret-name" not in response.text
    assert house.idle()


async def test_chat_without_a_template_is_400_but_completions_work(build: Callable[..., Any]) -> None:
    from_conftest = build().tokenizer.__class__
    house = build(tokenizer=from_conftest(chat_template=""))
    await house.gateway.start()
    async with house.client() as client:
        response = await client.post(CHAT, json=chat())
        assert (response.status_code, response.json()["error"]["code"]) == (400, "no_chat_template")
        body = {"model": "tiny-base", "prompt": "a"}
        assert (await client.post(COMPLETIONS, json=body)).status_code == 200


async def test_failure_before_the_first_token_has_a_true_status(client: httpx.AsyncClient, house: Any) -> None:
    house.engine.fail_at = 0
    for stream in (False, True):
        response = await client.post(CHAT, json=chat(stream=stream))
        assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_error")
    assert house.idle()


async def test_r10_failure_after_the_first_token(client: httpx.AsyncClient, house: Any) -> None:
    house.engine.fail_at = 2
    *chunks, error, done = frames(await client.post(CHAT, json=chat(stream=True)))
    assert done == "[DONE]"
    assert error == {
        "error": {
            "message": "the engine failed on this request",
            "type": "server_error",
            "param": None,
            "code": "engine_error",
        }
    }
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert (await client.post(CHAT, json=chat())).status_code == 500
    assert house.idle()


async def test_a_request_that_never_finishes_is_an_error(client: httpx.AsyncClient, house: Any) -> None:
    house.engine.words = ()
    house.engine.dead = False
    house.engine.generate = _cut_short  # an engine whose stream just ends
    response = await client.post(CHAT, json=chat())
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_error")


async def _cut_short(*_: Any) -> Any:
    return
    yield


async def test_body_over_the_cap_is_413(client: httpx.AsyncClient) -> None:
    async def chunks() -> Any:
        for _ in range(30):
            yield b" " * 1000

    for content in (b" " * 30_000, chunks()):
        response = await client.post(CHAT, content=content)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


async def test_one_failing_prompt_ends_its_sisters(client: httpx.AsyncClient, house: Any) -> None:
    house.engine.fail_at = 1
    response = await client.post(COMPLETIONS, json={"model": "tiny-base", "prompt": ["a", "b", "c"]})
    assert response.status_code == 500
    assert house.idle()
