"""Sampling fields over HTTP: what reaches the engine, and what is refused before it."""

import json
import logging
from typing import Any

import httpx
import pytest

from server.core import FinishReason, Structure
from server.engine.base import GrammarError, SamplingError
from server.wire import Unread

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "point", "strict": True, "schema": POINT}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny-base", "messages": [{"role": "user", "content": "hi"}], **fields}


def chunks(response: httpx.Response) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]


async def test_sampling_fields_reach_the_engine(client: httpx.AsyncClient, house: Any) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 3,
        "stop": ["x", "y"],
        "stop_token_ids": [5, 6],
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.25,
        "min_tokens": 2,
        "ignore_eos": True,
        "max_tokens": 9,
        "cache_salt": "tenant",
    }
    for path, body in ((CHAT, chat(**fields)), (COMPLETIONS, {"model": "tiny-base", "prompt": "a", **fields})):
        assert (await client.post(path, json={**body, "logit_bias": {"5": -100, "07": 1.5}})).status_code == 200
        _, sampling, _, salt = house.engine.calls[-1]
        assert salt == fields["cache_salt"]
        assert sampling.logit_bias == ((5, -100.0), (7, 1.5))
        for name, value in fields.items():
            expected = tuple(value) if isinstance(value, list) else value
            assert name == "cache_salt" or getattr(sampling, name) == expected, name


@pytest.mark.parametrize(
    ("fields", "structure"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Structure("json_object", "response_format")),
        ({"response_format": FORMAT}, Structure("json_schema", "response_format", json.dumps(POINT))),
        ({"structured_outputs": {"json": POINT}}, Structure("json_schema", "structured_outputs", json.dumps(POINT))),
        (
            {"structured_outputs": {"json": json.dumps(POINT)}},
            Structure("json_schema", "structured_outputs", json.dumps(POINT)),
        ),
        ({"structured_outputs": {"json_object": True}}, Structure("json_object", "structured_outputs")),
        ({"structured_outputs": {"regex": "[ab]+"}}, Structure("regex", "structured_outputs", "[ab]+")),
        (
            {"structured_outputs": {"choice": ["yes", "no"]}},
            Structure("choice", "structured_outputs", choices=("yes", "no")),
        ),
        (
            {"structured_outputs": {"grammar": 'root ::= "a"'}},
            Structure("grammar", "structured_outputs", 'root ::= "a"'),
        ),
    ],
)
async def test_structures_reach_the_engine(
    client: httpx.AsyncClient, house: Any, fields: dict[str, Any], structure: Structure | None
) -> None:
    for path, body in ((CHAT, chat()), (COMPLETIONS, {"model": "tiny-base", "prompt": "a"})):
        assert (await client.post(path, json={**body, **fields})).status_code == 200
        assert house.engine.calls[-1][1].structure == structure


BAD = [
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": 1, "01": 1}}, "logit_bias"),
    ({"logit_bias": {"1": True}}, "logit_bias"),
    ({"logit_bias": {"1": "5"}}, "logit_bias"),
    ({"logit_bias": {"256": 5}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [256]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 257}, "stop_token_ids"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"min_tokens": 64}, "min_tokens"),
    ({"request_id": "a b"}, "request_id"),
    ({"request_id": "x" * 129}, "request_id"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "robot"}}}},
        "response_format.json_schema.schema",
    ),
    ({"structured_outputs": {}}, "structured_outputs.json"),
    ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"regex": "a" * 8193}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a"] * 257}}, "structured_outputs.choice"),
    ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
async def test_bad_values_are_400_and_name_the_field(
    client: httpx.AsyncClient, house: Any, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(CHAT, json=chat(**fields))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert error["code"] in ("invalid_value", "missing_parameter")
    assert not house.engine.calls
    assert house.idle()


async def test_a_structure_beside_tools_is_refused(client: httpx.AsyncClient, house: Any) -> None:
    tools = [{"type": "function", "function": {"name": "now"}}]
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "required"}):
        response = await client.post(CHAT, json=chat(tools=tools, response_format=FORMAT, **choice))
        assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")
    held = await client.post(CHAT, json=chat(tools=tools, response_format=FORMAT, tool_choice="none"))
    assert held.status_code == 200
    assert house.engine.calls[-1][1].structure.field == "response_format"


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_refuses_is_400_and_names_the_field(
    client: httpx.AsyncClient, house: Any, stream: bool
) -> None:
    for refusal in (GrammarError("no such pattern", param="response_format"), SamplingError("no", param="logit_bias")):
        house.engine.generate_error = refusal
        response = await client.post(CHAT, json=chat(stream=stream))
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", refusal.param)
    assert house.idle()


@pytest.mark.parametrize("field", ["bad_words", "guided_json", "suffix", "extra_body", "prompt_logprobs"])
async def test_known_fields_that_are_not_served_are_refused(client: httpx.AsyncClient, field: str) -> None:
    body = {"model": "tiny-base", "prompt": "a"}
    error = (await client.post(COMPLETIONS, json={**body, field: ["x"]})).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", field)
    assert (await client.post(COMPLETIONS, json={**body, field: None})).status_code == 200


async def test_unknown_fields_are_tolerated_and_told_once(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "deltaworks.wire")
    for fields in ({"store": True, "some_future_field": {"a": 1}}, {"store": False}, {"user": "u", "y" * 500: 1}):
        assert (await client.post(CHAT, json=chat(**fields))).status_code == 200
    told = [record.fields["field"] for record in caplog.records]  # type: ignore[attr-defined]
    assert told == ["some_future_field", "store", "user", "y" * 64]


def test_a_flood_of_unknown_fields_ends_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "deltaworks.wire")
    unread = Unread()
    for start in range(0, 1000, 10):
        unread.note([f"f{i}" for i in range(start, start + 10)])
    assert len(caplog.records) == 64


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steering": {"profil": "p", "direction": "use_context"}}, "did you mean 'profile'?"),
        ({"steering": {"profile": "p", "direction": "use_context", "returm": {}}}, "did you mean 'return'?"),
        ({"steering": {"edits": [{"sae": "s", "features": [], "aply": {}}]}}, "did you mean 'apply'?"),
        ({"delta": [{"name": "a", "wieght": 1}]}, "did you mean 'weight'?"),
        ({"tool_gate": {"treshold": 1}}, "did you mean 'threshold'?"),
        (
            {
                "conflict": {
                    "policy": {
                        "if_at_least": 0.5,
                        "iff_at_least": 0.5,
                        "then": {"profile": "p", "direction": "use_context"},
                    }
                }
            },
            "did you mean 'if_at_least'?",
        ),
        ({"structured_outputs": {"regexp": "a"}}, "did you mean 'regex'?"),
        ({"tool_gate": {"zzz": 1}}, "known are allow_require, budget, explain, mode, policy, threshold"),
    ],
)
async def test_an_unknown_key_of_ours_is_refused_with_the_near_match(
    client: httpx.AsyncClient, fields: dict[str, Any], said: str
) -> None:
    response = await client.post(CHAT, json=chat(**fields))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_value")
    assert said in response.json()["error"]["message"]


async def test_priority_needs_its_setting(client: httpx.AsyncClient, build: Any, settings: Any) -> None:
    error = (await client.post(CHAT, json=chat(priority=-5))).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "priority")
    assert (await client.post(CHAT, json=chat(priority=0))).status_code == 200
    engine = settings.engine.model_copy(update={"scheduling_policy": "priority"})
    house = build(settings=settings.model_copy(update={"engine": engine}))
    await house.gateway.start()
    async with house.client() as other:
        assert (await other.post(CHAT, json=chat(priority=-5))).status_code == 200
    assert house.engine.calls[-1][1].priority == -5


async def test_request_id_names_the_answer(client: httpx.AsyncClient) -> None:
    for path, body, prefix in (
        (CHAT, chat(), "chatcmpl"),
        (COMPLETIONS, {"model": "tiny-base", "prompt": "a"}, "cmpl"),
    ):
        response = await client.post(path, json={**body, "request_id": "mine_1"}, headers={"x-request-id": "theirs"})
        assert (response.json()["id"], response.headers["x-request-id"]) == (f"{prefix}-mine_1", "theirs")


async def test_add_special_tokens(client: httpx.AsyncClient, house: Any) -> None:
    house.tokenizer.encode = lambda text, special: [1] * special + list(text.encode())
    for add, chats, texts in ((None, [], [1]), (True, [1], [1]), (False, [], [])):
        await client.post(CHAT, json=chat(add_special_tokens=add))
        assert house.engine.calls[-1][0] == [*chats, *b"u:hi\n"]
        await client.post(COMPLETIONS, json={"model": "tiny-base", "prompt": ["a"], "add_special_tokens": add})
        assert house.engine.calls[-1][0] == [*texts, *b"a"]


async def test_usage_so_far_in_every_chunk(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    told = chunks(await client.post(CHAT, json=chat(stream=True, stream_options=options)))
    assert [chunk["usage"]["completion_tokens"] for chunk in told] == [1, 1, 2, 3, 3, 3]
    assert {chunk["usage"]["prompt_tokens"] for chunk in told} == {len("u:hi\n")}
    assert told[-1]["choices"] == []
    body = {"model": "tiny-base", "prompt": "a", "stream": True, "stream_options": {"continuous_usage_stats": True}}
    told = chunks(await client.post(COMPLETIONS, json=body))
    assert [chunk["usage"]["completion_tokens"] for chunk in told] == [1, 2, 3]
    assert told[-1]["choices"][0]["finish_reason"] == FinishReason.STOP
