"""Promise S7: what a server writes down or tells holds no key and no text of a request, whatever becomes of the request."""

import json
import logging
from typing import Any

import httpx
import pytest

from server.logs import JsonFormatter, TextFormatter

pytestmark = pytest.mark.anyio

TEXT = "canary-text"
CHAT = {"model": "tiny-base", "messages": [{"role": "user", "content": TEXT}]}
COMPLETION = {"model": "tiny-base", "prompt": TEXT, "stop": TEXT, "user": TEXT}
TOOL = {"type": "function", "function": {"name": "f", "description": TEXT}}
GOOD = [
    ("/v1/chat/completions", {**CHAT, "stream": True}),
    ("/v1/chat/completions", {**CHAT, "tools": [TOOL], "tool_gate": {"mode": "observe", "explain": True}}),
    ("/v1/completions", {**COMPLETION, "echo": True}),
    ("/v1/completions", {**COMPLETION, "cache_salt": TEXT, "future_field": TEXT}),
    ("/tokenize", {"model": "tiny-base", "prompt": TEXT}),
]
REFUSED = [
    ("/v1/chat/completions", {**CHAT, "max_tokens": 10_000}),
    ("/v1/chat/completions", {**CHAT, "messages": [*CHAT["messages"], {"role": "tool", "content": TEXT}]}),
    ("/v1/chat/completions", {**CHAT, "n": "many"}),
    ("/v1/chat/completions", {**CHAT, "model": "nobody"}),
    ("/v1/completions", {**COMPLETION, "prompt": [TEXT, 1]}),
    ("/v1/completions", {**COMPLETION, "prompt": TEXT * 100}),
    ("/v1/completions", {**COMPLETION, "steering": {"profile": "nobody", "direction": "use_context"}}),
]
READ = [
    *("/v1/models", "/v1/admin/deltas", "/v1/admin/status", "/nowhere", "/version", "/health/ready"),
    *("/metrics", "/metrics/engine", "/metrics/compat"),
]


@pytest.fixture
def settings(settings: Any) -> Any:
    auth = type(settings.auth).model_validate({"api_keys": "canary-key", "admin_keys": "canary-admin"})
    return settings.model_copy(update={"auth": auth})


def written(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(form.format(record) for record in caplog.records for form in (JsonFormatter(), TextFormatter()))


async def test_s7_no_key_and_no_text_of_a_request_is_written_down(house: Any, caplog: pytest.LogCaptureFixture) -> None:
    keys = [f"Bearer {key}" for key in ("canary-key", "canary-admin", "canary-unknown")] + ["Basic canary-basic"]
    told = []
    house.engine.words = (f" {TEXT}-answer", " two")
    with caplog.at_level(logging.DEBUG):
        async with house.client({}) as client:

            async def ask(path: str, body: dict[str, Any], key: str = keys[0]) -> httpx.Response:
                return await client.post(path, content=json.dumps(body), headers={"authorization": key})

            for path, body in GOOD:
                assert (await ask(path, body)).status_code == 200
            for path, body in REFUSED:
                refused = await ask(path, body)
                assert refused.status_code in (400, 404)
                told.append(refused.text)
            for fail_at in (0, 1):
                house.engine.fail_at = fail_at
                told.append((await ask("/v1/chat/completions", CHAT)).text)
                assert "engine_error" in told[-1]
            for path in READ:
                for key in keys:
                    answer = await client.get(path, headers={"authorization": key})
                    told.append(answer.text + str(answer.headers))
    lines = written(caplog)
    assert lines.count('"msg": "request"') + lines.count('"msg":"request"') > len(GOOD + REFUSED)
    assert "EngineError" in lines
    assert "canary" not in lines
    assert "canary" not in "\n".join(told)
