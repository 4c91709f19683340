"""The stock openai client against the real HTTP server."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(live: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="user-key", max_retries=0, timeout=10) as client:
        yield client


@pytest.fixture
def digests(live: Any) -> dict[str, str]:
    found = {}
    for name in ("red", "blue"):
        content = name.encode()
        found[name] = hashlib.sha256(content).hexdigest()
        response = httpx.post(
            f"{live.url}/v1/admin/deltas",
            headers={"authorization": "Bearer admin-key"},
            data={"name": name, "sha256": found[name]},
            files={"file": ("delta.safetensors", content)},
        )
        assert response.status_code == 201
    return found


def test_chat_models_and_completions(client: openai.OpenAI, digests: dict[str, str]) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-base", "blue", "red"]
    assert client.models.retrieve("red").owned_by == "deltaworks"
    answer = client.chat.completions.create(model="red", messages=MESSAGES, logprobs=True, top_logprobs=1)
    assert answer.choices[0].message.content == f"{digests['red'][:6]} one two"
    assert answer.choices[0].logprobs is not None
    assert answer.model_extra is not None
    assert answer.model_extra["gateway"]["delta_digest"] == digests["red"]
    legacy = client.completions.create(model="blue", prompt=["a", "b"], max_tokens=1)
    assert [choice.text for choice in legacy.choices] == [digests["blue"][:6]] * 2


def test_stream_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny-base", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "base one two"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


def test_steering_in_extra_body(client: openai.OpenAI, live: Any) -> None:
    response = httpx.post(
        f"{live.url}/v1/admin/profiles",
        headers={"authorization": "Bearer admin-key"},
        data={"name": "knowledge", "sha256": hashlib.sha256(b"{}").hexdigest()},
        files={"file": ("knowledge.profile", b"{}")},
    )
    assert response.status_code == 201
    steering = {"profile": "knowledge", "direction": "use_context"}
    wanted: dict[str, Any] = {"steering": steering, "conflict": {"score": True}}
    answer = client.chat.completions.create(model="tiny-base", messages=MESSAGES, extra_body=wanted)
    assert answer.model_extra is not None
    assert answer.model_extra["gateway"]["steering"]["applied"] is True
    first = next(
        iter(client.chat.completions.create(model="tiny-base", messages=MESSAGES, stream=True, extra_body=wanted))
    )
    assert first.model_extra is not None
    assert first.model_extra["gateway"]["conflict"] == {"score": 0.5, "layer": 11, "auroc": 0.9}
    wanted = {"steering": {**steering, "strength": 9}}
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny-base", messages=MESSAGES, extra_body=wanted)
    assert bad.value.param == "steering.strength"


def test_tool_calls_streamed_and_at_once(client: openai.OpenAI, live: Any) -> None:
    """The client's own accumulator puts the stream together, and the answer goes back as history."""
    tools: list[Any] = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
    live.house.engine.texts[0] = (
        "Well. ",
        "<tool_call>",
        '{"name": "now", "arguments": {"tz": "CET"}}',
        "</tool_call>",
    ) * 2
    answer = client.chat.completions.create(model="tiny-base", messages=MESSAGES, tools=tools)
    assert answer.choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(model="tiny-base", messages=MESSAGES, tools=tools) as stream:
        final = stream.get_final_completion()
    for message in (answer.choices[0].message, final.choices[0].message):
        assert message.content == "Well. "
        calls: list[Any] = list(message.tool_calls or ())
        assert [(call.type, call.function.name, call.function.arguments) for call in calls] == [
            ("function", "now", '{"tz": "CET"}')
        ] * 2
        assert len({call.id for call in calls}) == 2
    assert final.choices[0].finish_reason == "tool_calls"
    results = [{"role": "tool", "tool_call_id": call.id, "content": "9"} for call in calls]
    history: list[Any] = [*MESSAGES, message, *results]
    live.house.engine.max_model_len = 500
    assert client.chat.completions.create(model="tiny-base", messages=history, tools=tools).choices
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny-base", messages=[*MESSAGES, results[0]], tools=tools)  # type: ignore[list-item]
    assert bad.value.param == "messages.1.tool_call_id"


def test_errors_become_the_clients_classes(client: openai.OpenAI, live: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny-base", messages=MESSAGES, max_tokens=1000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    live.house.engine.fail_at = 2
    with pytest.raises(openai.APIError, match="the engine failed"):
        list(client.chat.completions.create(model="tiny-base", messages=MESSAGES, stream=True))
    assert live.wait_idle()


def test_sixteen_at_once_over_base_and_deltas(client: openai.OpenAI, digests: dict[str, str], live: Any) -> None:
    words = {"tiny-base": "base", "red": digests["red"][:6], "blue": digests["blue"][:6]}
    models = [list(words)[number % 3] for number in range(16)]

    def ask(model: str) -> str | None:
        return client.chat.completions.create(model=model, messages=MESSAGES).choices[0].message.content

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(ask, models))
    assert answers == [f"{words[model]} one two" for model in models]
    assert live.wait_idle()
    assert sorted(live.house.engine.loads) == sorted(digests.values())


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_r10_a_stream_that_fails_midway_raises_and_ends(client: openai.OpenAI, live: Any, endpoint: str) -> None:
    live.house.engine.fail_at = 2
    if endpoint == "chat":
        stream: Any = client.chat.completions.create(model="tiny-base", messages=MESSAGES, stream=True)
    else:
        stream = client.completions.create(model="tiny-base", prompt="a", stream=True)
    received: list[Any] = []
    with pytest.raises(openai.APIError) as failed:
        received.extend(stream)
    assert failed.value.code == "engine_error"
    assert received
    assert all(choice.finish_reason is None for chunk in received for choice in chunk.choices)
    assert live.wait_idle()
