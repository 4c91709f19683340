"""A small agent: asks with tools, runs the calls that come back, asks again, and keeps what every request cost."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from steering.gate.answers import right
from steering.gate.dialogue import proposed
from steering.gate.endpoint import Endpoint, pointed
from steering.gate.tasks import Task
from steering.gate.tools import Toolbox

Mode = Literal["off", "observe", "enforce"]
MODES: tuple[Mode, ...] = ("off", "observe", "enforce")
ACTED = ("suppress", "narrow", "require")


@dataclass(frozen=True)
class Round:
    """One request. `seconds` is the client's; `decision` and what follows are the gateway's report, "" and 0 where it has none."""

    seconds: float
    prompt_tokens: int
    completion_tokens: int
    calls: int
    decision: str = ""
    reason: str = ""
    score: float | None = None
    probe_prompt_tokens: int = 0
    probe_completion_tokens: int = 0
    gate_ms: float = 0.0
    leak: bool = False


@dataclass(frozen=True)
class Episode:
    """One question in one mode. `answer` is the last text, "" where the rounds ran out."""

    task: str
    mode: Mode
    right: bool
    answer: str
    rounds: tuple[Round, ...]

    @property
    def calls(self) -> int:
        return sum(one.calls for one in self.rounds)

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.rounds)

    @property
    def acted(self) -> bool:
        """Whether the gate changed a request, or would have."""
        return any(one.decision in ACTED for one in self.rounds)


@dataclass(frozen=True)
class Agent:
    """`policy` is the name of the policy that the gateway is asked for in every mode but off."""

    endpoint: Endpoint
    toolbox: Toolbox
    model: str
    policy: str
    max_tokens: int = 64
    max_rounds: int = 6

    async def run(self, task: Task, mode: Mode) -> Episode:
        """Greedy from the question to an answer without calls. Raises EndpointError."""
        messages: list[Mapping[str, Any]] = list(task.dialogue)
        rounds: list[Round] = []
        for _ in range(self.max_rounds):
            started = time.perf_counter()
            answer = await self.endpoint.chat(self._body(task, messages, mode))
            seconds = time.perf_counter() - started
            calls = proposed(answer.tool_calls)
            rounds.append(round_of(answer.body, seconds, len(calls)))
            if not calls:
                return Episode(task.id, mode, right(answer.text, task.gold), answer.text, tuple(rounds))
            messages.append(
                {"role": "assistant", "content": answer.text or None, "tool_calls": list(answer.tool_calls)}
            )
            for identifier, call in calls:
                result = await self.toolbox.run(task, call.name, call.arguments)
                messages.append({"role": "tool", "tool_call_id": identifier, "content": result})
        return Episode(task.id, mode, False, "", tuple(rounds))

    def _body(self, task: Task, messages: list[Mapping[str, Any]], mode: Mode) -> dict[str, Any]:
        gate = {"mode": mode} if mode == "off" else {"mode": mode, "policy": self.policy}
        return {
            "model": self.model,
            "messages": list(messages),
            "tools": list(task.tools),
            "temperature": 0.0,
            "max_tokens": self.max_tokens,
            "tool_gate": gate,
        }


def round_of(body: Mapping[str, Any], seconds: float, calls: int) -> Round:
    """A chat completion's body, with its `usage` and its `gateway.tool_gate`."""
    usage = body.get("usage") or {}
    _, told = pointed(body, "/gateway/tool_gate")
    gate = told if isinstance(told, Mapping) else {}
    probes = gate.get("probe_usage") or {}
    return Round(
        seconds=seconds,
        prompt_tokens=int(usage.get("prompt_tokens", 0)),
        completion_tokens=int(usage.get("completion_tokens", 0)),
        calls=calls,
        decision=str(gate.get("decision", "")),
        reason=str(gate.get("reason", "")),
        score=gate.get("score"),
        probe_prompt_tokens=int(probes.get("prompt_tokens", 0)),
        probe_completion_tokens=int(probes.get("completion_tokens", 0)),
        gate_ms=float(gate.get("latency_ms", 0.0)),
        leak=bool(gate.get("leak", False)),
    )
