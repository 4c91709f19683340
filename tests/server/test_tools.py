"""Tools over HTTP and a fake engine: what the prompt shows, what the engine is held to, and what comes back."""

import itertools
import json
import logging
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.core import Structure
from server.engine.base import GrammarError
from server.engine.sampling import check_grammar
from server.logs import JsonFormatter

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "w", "description": "Weather", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now"}}
CALLS = (
    "On it. ",
    '<tool_call>{"name": "w", "argu',
    'ments": {"city": "Ж"}}</tool_call>',
    "<tool_call>",
    '{"name": "now",',
    ' "arguments": {}}',
)
NAMED = {"type": "function", "function": {"name": "w"}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny-base", "messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER, NOW], **fields}


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(CHAT, json=chat(**fields))
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


async def chunks(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    response = await client.post(CHAT, json=chat(stream=True, **fields))
    *lines, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines]


def folded(choices: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of a stream's deltas; fails on deltas that no client could put together."""
    content, reasoning, calls = "", "", []
    for delta in (choice["delta"] for choice in choices):
        content += delta.get("content") or ""
        reasoning += delta.get("reasoning_content") or ""
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                assert piece["index"] == len(calls)
                assert piece["type"] == "function"
                calls.append({"id": piece["id"], "type": "function", "function": dict(piece["function"])})
            else:
                assert piece["index"] == len(calls) - 1
                calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls or reasoning:
        message["content"] = content or None
    return message | ({"tool_calls": calls} if calls else {}) | ({"reasoning_content": reasoning} if reasoning else {})


def functions(message: dict[str, Any]) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]


def other_house(build: Callable[..., Any], settings: Any, **tools: Any) -> Any:
    return build(settings=settings.model_copy(update={"tools": settings.tools.model_copy(update=tools)}))


async def test_calls_come_apart_from_the_content(client: httpx.AsyncClient, house: Any) -> None:
    house.engine.texts[0] = CALLS
    choice = await ask(client)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "On it. "
    assert functions(choice["message"]) == [("w", '{"city": "Ж"}'), ("now", "{}")]
    ids = [call["id"] for call in choice["message"]["tool_calls"]]
    assert all(re.fullmatch(r"call_[0-9a-f]{24}", one) for one in ids)
    assert len(set(ids)) == 2
    assert house.idle()


async def test_a_stream_holds_the_same(client: httpx.AsyncClient, house: Any) -> None:
    house.engine.texts[0] = CALLS
    streamed = await chunks(client)
    assert [choice["finish_reason"] for choice in streamed[:-1]] == [None] * (len(streamed) - 1)
    assert streamed[-1]["finish_reason"] == "tool_calls"
    message = folded(streamed)
    assert functions(message) == [("w", '{"city": "Ж"}'), ("now", "{}")]
    assert message["content"] == "On it. "
    assert [choice["delta"].get("content") for choice in streamed[:2]] == ["", "On it. "]


async def test_content_is_null_where_there_are_only_calls(client: httpx.AsyncClient, house: Any) -> None:
    house.engine.texts[0] = ("<tool_call>", '{"name": "now", "arguments": {}}', "</tool_call>")
    assert (await ask(client))["message"]["content"] is None
    house.engine.texts[0] = ("plain",)
    choice = await ask(client)
    assert (choice["message"], choice["finish_reason"]) == ({"role": "assistant", "content": "plain"}, "stop")


async def test_what_is_no_call_is_content(client: httpx.AsyncClient, house: Any) -> None:
    house.engine.texts[0] = ("a <tool_", "call>{broken", "</tool_call>")
    choice = await ask(client)
    assert (choice["message"]["content"], choice["finish_reason"]) == ("a <tool_call>{broken</tool_call>", "stop")
    assert folded(await chunks(client)) == choice["message"]


async def test_every_choice_is_read_by_itself(client: httpx.AsyncClient, house: Any) -> None:
    house.engine.texts = {0: CALLS, 1: ("no ", "call"), 2: CALLS[3:]}
    response = await client.post(CHAT, json=chat(n=3))
    choices = response.json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["tool_calls", "stop", "tool_calls"]
    assert [len(functions(choice["message"])) for choice in choices] == [2, 0, 1]
    streamed = await chunks(client, n=3)
    for index in range(3):
        message = folded([choice for choice in streamed if choice["index"] == index])
        assert functions(message) == functions(choices[index]["message"])
    ids = [call["id"] for choice in choices for call in choice["message"].get("tool_calls", ())]
    assert len(set(ids)) == 3


async def test_one_call_only_where_calls_are_not_parallel(client: httpx.AsyncClient, house: Any) -> None:
    house.engine.texts[0] = CALLS
    choice = await ask(client, parallel_tool_calls=False)
    assert [name for name, _ in functions(choice["message"])] == ["w"]
    assert functions(folded(await chunks(client, parallel_tool_calls=False))) == functions(choice["message"])


async def test_the_limit_stays_the_reason_where_it_cut_the_answer(client: httpx.AsyncClient, house: Any) -> None:
    house.engine.texts[0] = (*CALLS[:3], "x")
    choice = await ask(client, max_tokens=3)
    assert (choice["finish_reason"], len(functions(choice["message"]))) == ("length", 1)


async def test_none_shows_the_tools_and_reads_no_calls(client: httpx.AsyncClient, house: Any) -> None:
    house.engine.texts[0] = CALLS
    choice = await ask(client, tool_choice="none")
    assert choice["message"]["content"] == "".join(CALLS)
    assert choice["finish_reason"] == "stop"
    assert bytes(house.engine.calls[-1][0]) == b"w;now;||u:hi\n"
    assert house.engine.calls[-1][1].structure is None


async def test_none_can_hide_the_tools(build: Callable[..., Any], settings: Any) -> None:
    house = other_house(build, settings, exclude_when_none=True)
    await house.gateway.start()
    async with house.client() as client:
        await ask(client, tool_choice="none")
        assert bytes(house.engine.calls[-1][0]) == b"u:hi\n"
        await ask(client)
        assert bytes(house.engine.calls[-1][0]) == b"w;now;||u:hi\n"


async def test_plain_chats_are_rendered_as_ever(client: httpx.AsyncClient, house: Any) -> None:
    await ask(client, tools=None)
    assert bytes(house.engine.calls[-1][0]) == b"u:hi\n"
    assert house.engine.calls[-1][1].skip_special_tokens
    house.engine.texts[0] = CALLS
    assert (await ask(client, tools=None, tool_choice="none"))["message"]["content"] == "".join(CALLS)


async def test_required_is_a_schema_for_the_engine(client: httpx.AsyncClient, house: Any) -> None:
    house.engine.texts[0] = (
        '[{"name": "w", "param',
        'eters": {"city": "A"}}',
        ', {"name": "now", "parameters": {}}',
        "]",
    )
    choice = await ask(client, tool_choice="required")
    schema = json.loads(house.engine.calls[-1][1].structure.rule)
    assert [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]] == ["w", "now"]
    assert schema["$defs"] == {"w": CITY, "now": {"type": "object", "properties": {}}}
    assert "maxItems" not in schema
    assert choice["finish_reason"] == "tool_calls"
    assert (choice["message"]["content"], functions(choice["message"])) == (
        None,
        [("w", '{"city": "A"}'), ("now", "{}")],
    )
    assert functions(folded(await chunks(client, tool_choice="required"))) == functions(choice["message"])
    await ask(client, tool_choice="required", parallel_tool_calls=False)
    assert json.loads(house.engine.calls[-1][1].structure.rule)["maxItems"] == 1


async def test_references_move_with_their_schema(client: httpx.AsyncClient, house: Any) -> None:
    inner = {"type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, "$defs": {"P": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": name, "parameters": inner}} for name in ("a", "b")]
    await client.post(CHAT, json=chat(tools=tools, tool_choice="required"))
    schema = json.loads(house.engine.calls[-1][1].structure.rule)
    for name in ("a", "b"):
        assert schema["$defs"][name]["properties"]["p"] == {"$ref": f"#/$defs/{name}/$defs/P"}
        assert schema["$defs"][name]["$defs"]["P"] == {"type": "integer"}


async def test_a_named_function_gets_its_arguments_as_they_come(client: httpx.AsyncClient, house: Any) -> None:
    house.engine.texts[0] = ('{"city":', ' "A', '"}')
    choice = await ask(client, tool_choice=NAMED)
    assert json.loads(house.engine.calls[-1][1].structure.rule) == CITY
    assert (choice["finish_reason"], functions(choice["message"])) == ("stop", [("w", '{"city": "A"}')])
    streamed = await chunks(client, tool_choice=NAMED)
    pieces = [choice["delta"]["tool_calls"][0] for choice in streamed if "tool_calls" in choice["delta"]]
    assert [piece["function"]["arguments"] for piece in pieces] == ['{"city":', ' "A', '"}']
    assert functions(folded(streamed)) == functions(choice["message"])


async def test_allowed_tools_are_the_only_ones(client: httpx.AsyncClient, house: Any) -> None:
    def only(mode: str) -> dict[str, Any]:
        listed = [{"type": "function", "function": {"name": "now"}}]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": listed}}

    house.engine.texts[0] = CALLS
    choice = await ask(client, tool_choice=only("auto"))
    assert bytes(house.engine.calls[-1][0]) == b"now;||u:hi\n"
    assert house.engine.calls[-1][1].structure is None
    assert choice["finish_reason"] == "tool_calls"
    house.engine.texts[0] = ('[{"name": "now", "parameters": {}}]',)
    choice = await ask(client, tool_choice=only("required"))
    assert list(json.loads(house.engine.calls[-1][1].structure.rule)["$defs"]) == ["now"]
    assert (choice["finish_reason"], functions(choice["message"])) == ("tool_calls", [("now", "{}")])


async def test_calls_to_unknown_tools_can_stay_text(
    client: httpx.AsyncClient, build: Any, settings: Any, house: Any
) -> None:
    text = (
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>',
    )
    house.engine.texts[0] = text
    assert [name for name, _ in functions((await ask(client))["message"])] == ["rm", "now"]
    strict = other_house(build, settings, drop_unknown=True)
    await strict.gateway.start()
    async with strict.client() as strict_client:
        strict.engine.texts[0] = text
        choice = await ask(strict_client)
        assert (choice["message"]["content"], functions(choice["message"])) == (text[0], [("now", "{}")])
        assert folded(await chunks(strict_client))["content"] == text[0]
        strict.engine.texts[0] = text[:1]
        choice = await ask(strict_client)
        assert (choice["message"], choice["finish_reason"]) == ({"role": "assistant", "content": text[0]}, "stop")


async def test_history_reaches_the_prompt(client: httpx.AsyncClient, house: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "w", "arguments": '{"city": "A"}'}}
    bare = {"id": "c2", "function": {"name": "now", "arguments": ""}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call, bare]},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "9"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "8"},
    ]
    house.engine.max_model_len = 200
    await ask(client, messages=messages)
    assert bytes(house.engine.calls[-1][0]) == b"w;now;|w={'city': 'A'};now={};|u:hi\na:\nt:9\nt:8\n"
    await ask(client, messages=messages, tools=None)
    assert bytes(house.engine.calls[-1][0]).startswith(b"|w=")


async def test_logprobs_are_of_all_tokens(client: httpx.AsyncClient, house: Any) -> None:
    house.engine.texts[0] = CALLS
    choice = await ask(client, logprobs=True)
    assert [token["token"] for token in choice["logprobs"]["content"]] == list(CALLS)
    streamed = await chunks(client, logprobs=True)
    found = [choice["logprobs"]["content"] for choice in streamed if choice["logprobs"]]
    assert [token["token"] for token in itertools.chain(*found)] == list(CALLS)


async def test_thoughts_are_reasoning(build: Callable[..., Any], settings: Any) -> None:
    house = other_house(build, settings, parser="toolrl")
    await house.gateway.start()
    call = '<tool_call>\n{"name": "now", "parameters": {}}\n</tool_call>'
    house.engine.texts[0] = ("<thi", "nk> why", " not </think>\n", call, "<response> so </response>")
    async with house.client() as client:
        choice = await ask(client)
        assert choice["message"]["reasoning_content"] == "why not"
        assert choice["message"]["content"] == "so"
        assert functions(choice["message"]) == [("now", "{}")]
        message = folded(await chunks(client))
        assert (message["reasoning_content"], message["content"]) == ("why not", "so")


@pytest.mark.parametrize(
    ("parser", "skips"), [("hermes", False), ("toolrl", False), ("llama3_json", True), ("pythonic", True)]
)
async def test_marks_that_are_special_tokens_stay_in_the_text(
    build: Callable[..., Any], settings: Any, parser: str, skips: bool
) -> None:
    house = other_house(build, settings, parser=parser)
    await house.gateway.start()
    async with house.client() as client:
        await ask(client)
        assert house.engine.calls[-1][1].skip_special_tokens is skips
        await ask(client, tool_choice="none")
        assert house.engine.calls[-1][1].skip_special_tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_half_a_surrogate_pair_ends_no_stream(client: httpx.AsyncClient, house: Any, stream: bool) -> None:
    house.engine.texts[0] = ('<tool_call>{"name": "w", "arguments": {"city": "\\ud83c"}}</tool_call>',)
    message = folded(await chunks(client)) if stream else (await ask(client))["message"]
    assert functions(message) == [("w", '{"city": "\\ud83c"}')]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_schema_that_the_engine_refuses_is_400(client: httpx.AsyncClient, house: Any, stream: bool) -> None:
    house.engine.generate_error = GrammarError("uniqueItems is not supported", param="tools")
    response = await client.post(CHAT, json=chat(tool_choice="required", stream=stream))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", "tools")
    assert "uniqueItems" in error["message"]
    assert house.idle()


def test_a_grammar_that_vllm_fails_to_compile() -> None:
    """vLLM tells it by the reason of an answer that has no token; a later "error" is another matter."""
    tokens: dict[str, Any] = {"bad": [], "late": [7], "fine": []}
    reasons = {"bad": "error", "late": "error", "fine": None}
    outputs = {name: [SimpleNamespace(finish_reason=reasons[name], token_ids=tokens[name])] for name in tokens}
    schema = Structure("json_schema", "tools", "{}")
    with pytest.raises(GrammarError):
        check_grammar(SimpleNamespace(outputs=outputs["bad"]), schema)  # type: ignore[arg-type]
    for name in ("late", "fine"):
        check_grammar(SimpleNamespace(outputs=outputs[name]), schema)  # type: ignore[arg-type]


async def test_an_engine_that_fails_amid_a_call(client: httpx.AsyncClient, house: Any) -> None:
    house.engine.texts[0] = CALLS
    house.engine.fail_at = 2
    response = await client.post(CHAT, json=chat(stream=True))
    *_, error, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    assert "engine_error" in error
    assert house.idle()


async def test_calls_are_counted_and_logged(client: httpx.AsyncClient, house: Any, caplog: Any) -> None:
    house.engine.texts[0] = CALLS
    with caplog.at_level(logging.INFO, logger="deltaworks.request"):
        await ask(client)
    line = json.loads(JsonFormatter().format(caplog.records[-1]))
    assert line["tools"] == {"choice": "auto", "offered": 2, "parsed": 2, "malformed": 0, "suppressed": 0}
    house.engine.texts[0] = ("<tool_call>{",)
    await ask(client)
    house.engine.texts[0] = ('{"city": "cut',)
    await ask(client, tool_choice=NAMED)
    await ask(client, tools=None)
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    found = {
        s.labels["outcome"]: s.value for f in families for s in f.samples if s.name == "deltaworks_tool_calls_total"
    }
    assert found == {"parsed": 2, "malformed": 2, "suppressed": 0}
