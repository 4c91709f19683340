"""Gated requests over the fake engine: policies whose scores are easy to follow, and one way to ask."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from tests.server.fake_engine import Said
from tests.steering.gate_world import document, stage, tool

CHAT = "/v1/chat/completions"
EASY, HARD = "Who wrote it?", "What is 12345 + 67890?"  # static scores 0.88 and 0.40
STATIC = {"stages": [stage("static", -1, 2, 0.1, 0.9)], "probes": {}}  # the threshold is 0.8
SURE, UNSURE, HOPELESS = Said(("80235",), -0.01), Said(("80235",), -0.3), Said(("80235",), -2.0)
PATIENT_MS = 60_000  # a busy machine is no reason to decide otherwise
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "1+1"}}</tool_call>'


@dataclass
class Bed:
    """`say` maps kinds of engine requests to what the engine answers: "0" is the request itself, "draft" the probe ..."""

    house: Any
    client: httpx.AsyncClient
    upload: Callable[..., Any]
    template: str = ""

    async def open(self) -> None:
        self.house.engine.max_model_len = 4000
        body = (await self.client.post(CHAT, json=self.body(tool_gate=None))).json()
        self.template = body["gateway"]["template_sha256"]
        self.forget()

    def forget(self) -> None:
        for seen in (self.house.engine.rows, self.house.engine.calls, self.house.engine.asked):
            seen.clear()

    def say(self, **said: Said) -> None:
        answers = {"0" if kind == "main" else kind: one for kind, one in said.items()}
        self.house.engine.script = lambda row: answers.get(kind_of(row))

    def document(self, **changes: Any) -> dict[str, Any]:
        """Bound to the base of the house, unless `changes` say otherwise."""
        bound = {"base_fingerprint": "sha256:ba5e", "delta_digest": None, "template_sha256": self.template}
        made = document(**{**changes, "model": {**bound, **changes.get("model", {})}})
        made["probes"] = {**made["probes"], "timeout_ms": changes.get("probes", {}).get("timeout_ms", PATIENT_MS)}
        return made

    async def policy(self, name: str = "gate", **changes: Any) -> str:
        """Upload a policy; its digest."""
        content = json.dumps(self.document(**changes)).encode()
        response = await self.upload(name, content, "policies")
        assert response.status_code == 201, response.text
        return hashlib.sha256(content).hexdigest()

    def body(self, text: str = EASY, tools: tuple[str, ...] = ("calculator",), **fields: Any) -> dict[str, Any]:
        made = {
            "model": "tiny-base",
            "messages": [{"role": "user", "content": text}],
            "tools": [tool(name) for name in tools] or None,
            "tool_gate": {"mode": "enforce"},
            **fields,
        }
        return {key: value for key, value in made.items() if value is not None}

    async def ask(self, text: str = EASY, tools: tuple[str, ...] = ("calculator",), **fields: Any) -> httpx.Response:
        self.forget()
        response = await self.client.post(CHAT, json=self.body(text, tools, **fields))
        assert response.status_code == 200, response.text
        assert self.house.idle()
        return response

    async def told(self, *args: Any, **fields: Any) -> dict[str, Any]:
        """The answer's `gateway.tool_gate`."""
        told: dict[str, Any] = (await self.ask(*args, **fields)).json()["gateway"]["tool_gate"]
        return told

    @property
    def kinds(self) -> list[str]:
        """What the engine was asked, in order."""
        return [kind_of(row) for row in self.house.engine.rows]

    def prompt(self, place: int) -> str:
        return bytes(self.house.engine.calls[place][0]).decode()


def kind_of(row: str) -> str:
    return row.split("-", 1)[1]


def message_of(response: httpx.Response) -> dict[str, Any]:
    message: dict[str, Any] = response.json()["choices"][0]["message"]
    return message


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    *lines, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(line) for line in lines]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def head(response: httpx.Response) -> tuple[str, str]:
    return response.headers["x-tool-gate"], response.headers["x-tool-gate-reason"]
