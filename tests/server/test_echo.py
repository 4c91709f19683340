"""Completions that repeat their prompt, and score it, as evaluation harnesses ask."""

import json
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"


async def ask(client: httpx.AsyncClient, **fields: Any) -> list[Any]:
    body = {"model": "tiny-base", "prompt": "ab", "echo": True, **fields}
    response = await client.post(COMPLETIONS, json=body)
    assert response.status_code == 200, response.text
    choices: list[Any] = response.json()["choices"]
    return choices


async def test_echo_is_the_prompt_then_the_answer(client: httpx.AsyncClient, house: Any) -> None:
    (choice,) = await ask(client)
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == ("abbase one two", None, "stop")
    assert house.engine.calls[-1][1].prompt_logprobs is None
    choices = await ask(client, prompt=[[97, 98], [99]], n=2, max_tokens=1)
    assert [choice["text"] for choice in choices] == ["abbase", "abbase", "cbase", "cbase"]
    assert house.idle()


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_what_a_harness_asks_for_log_likelihoods(client: httpx.AsyncClient, house: Any, max_tokens: int) -> None:
    """The request of lm-eval's local-completions; its parser reads [context:-1] where one token was generated."""
    body = {
        "model": "tiny-base",
        "prompt": [[97, 98, 99], [100, 101]],
        "temperature": 0,
        "max_tokens": max_tokens,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    answer = (await client.post(COMPLETIONS, json=body)).json()
    first, second = answer["choices"]
    generated = ["base"] * max_tokens
    assert first["logprobs"] == {
        "tokens": ["a", "b", "c", *generated],
        "token_logprobs": [None, -0.25, -0.25, *([-0.5] * max_tokens)],
        "top_logprobs": [
            None,
            {"x": -9999.0, "b": -0.25},
            {"x": -9999.0, "c": -0.25},
            *([{"x": -9999.0, "base": -0.5}] * max_tokens),
        ],
        "text_offset": [0, 1, 2, *([3] * max_tokens)],
    }
    assert first["text"] == "abc" + "".join(generated)
    assert second["logprobs"]["tokens"] == ["d", "e", *generated]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"]["completion_tokens"] == 2 * max_tokens
    assert {call[1].prompt_logprobs for call in house.engine.calls} == {1}
    assert {call[1].max_tokens for call in house.engine.calls} == {1}


async def test_a_prompt_of_one_token(client: httpx.AsyncClient) -> None:
    (choice,) = await ask(client, prompt=[97], logprobs=0, max_tokens=0)
    assert choice["logprobs"] == {
        "tokens": ["a"],
        "token_logprobs": [None],
        "top_logprobs": [None],
        "text_offset": [0],
    }


async def test_streamed_echo_says_the_same(client: httpx.AsyncClient) -> None:
    for fields in ({"logprobs": 1}, {"logprobs": 1, "max_tokens": 0}, {}, {"n": 2, "max_tokens": 2}):
        folded: dict[int, Any] = {}
        body = {"model": "tiny-base", "prompt": "ab", "echo": True, "stream": True, **fields}
        response = await client.post(COMPLETIONS, json=body)
        for line in response.text.split("\n\n")[:-2]:
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            into = folded.setdefault(choice["index"], {"text": "", "tokens": [], "text_offset": []})
            into["text"] += choice["text"]
            for key in ("tokens", "text_offset"):
                into[key] += (choice["logprobs"] or {key: []})[key]
            into["finish_reason"] = choice["finish_reason"]
        for choice in await ask(client, **fields):
            logprobs = choice["logprobs"] or {"tokens": [], "text_offset": []}
            assert folded[choice["index"]] == {
                "text": choice["text"],
                "tokens": logprobs["tokens"],
                "text_offset": logprobs["text_offset"],
                "finish_reason": choice["finish_reason"],
            }


async def test_echo_repeats_the_text_as_it_came(client: httpx.AsyncClient, house: Any) -> None:
    """Not what the ids would decode to: a tokenizer adds special tokens, and may drop what it does not know."""
    house.tokenizer.encode = lambda text, special: [1] * special + list(text.encode())
    (choice,) = await ask(client, logprobs=0, max_tokens=0)
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("ab", ["\x01", "a", "b"])


async def test_no_tokens_without_echo_is_400(client: httpx.AsyncClient, house: Any) -> None:
    for echo in (None, False):
        body = {"model": "tiny-base", "prompt": "a", "max_tokens": 0, "echo": echo}
        response = await client.post(COMPLETIONS, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "max_tokens")
    assert not house.engine.calls
