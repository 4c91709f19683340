"""Tools on the real engine: the embedded base behind HTTP, held to schemas and read by the openai client."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

pytestmark = pytest.mark.engine

BASE = "smollm2-135m-instruct"
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Delft", "Paris", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"$ref": "#/$defs/Unit"},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
    "$defs": {"Unit": {"type": "string", "enum": ["celsius", "kelvin"]}},
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now", "description": "The time"}}
NAMED = {"type": "function", "function": {"name": "weather"}}
QUESTION = [{"role": "user", "content": "What is the weather in Paris, and what time is it there?"}]


@pytest.fixture(scope="module")
def client(base_server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base_server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client, **extra):
    fields = {"messages": QUESTION, "tools": [WEATHER, NOW], "temperature": 0, "max_tokens": 200, **extra}
    return client.chat.completions.create(model=BASE, **fields)


def fits(name, arguments):
    found = json.loads(arguments)
    if name == "now":
        return found == {}
    known = CITY["properties"]["city"]["enum"], ("celsius", "kelvin")
    return list(found) == ["city", "days", "unit"] and found["city"] in known[0] and found["unit"] in known[1]


def functions(message):
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]


def folded(stream):
    """Calls, content and last finish_reason, as a client puts the chunks together."""
    calls, content, reason = {}, "", None
    for chunk in stream:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for piece in choice.delta.tool_calls or ():
                name, arguments = calls.get(piece.index, (piece.function.name, ""))
                calls[piece.index] = name, arguments + (piece.function.arguments or "")
    assert list(calls) == list(range(len(calls)))
    return list(calls.values()), content or None, reason


def test_required_gives_calls_that_fit_their_schemas(client):
    choice = ask(client, tool_choice="required").choices[0]
    calls = functions(choice.message)
    assert choice.finish_reason == "tool_calls"
    assert calls
    assert all(fits(name, arguments) for name, arguments in calls)
    assert choice.message.content is None
    assert folded(ask(client, tool_choice="required", stream=True)) == (calls, None, "tool_calls")


def test_required_and_not_parallel_gives_one(client):
    answer = ask(client, tool_choice="required", parallel_tool_calls=False, n=3, temperature=1.0, seed=5)
    for choice in answer.choices:
        assert len(functions(choice.message)) == 1
        assert fits(*functions(choice.message)[0])
        assert choice.finish_reason == "tool_calls"


def test_a_named_function_gets_arguments_that_fit(client):
    choice = ask(client, tool_choice=NAMED).choices[0]
    ((name, arguments),) = functions(choice.message)
    assert (name, choice.finish_reason) == ("weather", "stop")
    assert fits(name, arguments)
    assert folded(ask(client, tool_choice=NAMED, stream=True)) == ([(name, arguments)], None, "stop")


def test_auto_streams_what_it_answers_at_once(client):
    for content in ("Hello, who are you?", "Call the function now."):
        messages = [{"role": "user", "content": content}]
        choice = ask(client, messages=messages, max_tokens=64).choices[0]
        calls, text, reason = folded(ask(client, messages=messages, max_tokens=64, stream=True))
        assert (calls, text, reason) == (functions(choice.message), choice.message.content, choice.finish_reason)


def test_a_conversation_goes_on_with_the_tools_answers(client):
    choice = ask(client, tool_choice=NAMED).choices[0]
    call = choice.message.tool_calls[0]
    messages = [*QUESTION, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 degrees"}]
    assert ask(client, messages=messages, tool_choice="none", max_tokens=16).choices[0].message.content


@pytest.mark.parametrize(
    "bad",
    [
        {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        {"type": "string", "pattern": "(("},
        {"type": "integer", "minimum": -(10**30)},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_without_a_grammar_is_400_before_the_first_token(client, bad, stream):
    schema = {"type": "object", "properties": {"a": bad}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, tools=tools, tool_choice="required", stream=stream)
    assert (refused.value.code, refused.value.param) == ("invalid_value", "tools")
    assert ask(client, tools=tools, max_tokens=4).choices[0].message.content is not None


def test_rows_beside_a_grammar_answer_as_alone(base_server, client):
    plain = {"messages": QUESTION, "tools": openai.omit, "max_tokens": 48}
    alone = ask(client, **plain).choices[0].message.content
    forced = functions(ask(client, tool_choice="required").choices[0].message)
    with ThreadPoolExecutor(6) as threads:
        rows = [threads.submit(ask, client, **(plain if i % 2 else {"tool_choice": "required"})) for i in range(6)]
        answers = [row.result().choices[0].message for row in rows]
    assert [answer.content for answer in answers[1::2]] == [alone] * 3
    assert [functions(answer) for answer in answers[::2]] == [forced] * 3
    metrics = httpx.get(f"{base_server.url}/metrics", headers=base_server.admin_headers).text
    assert 'deltaworks_tool_calls_total{outcome="parsed"}' in metrics
