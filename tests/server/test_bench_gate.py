"""The gate's bench: the agent's loop against a scripted gateway, and the arithmetic of its table."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.bench.agent import MODES, Agent, Episode, Mode, Round
from server.bench.gate import ask_all
from server.bench.gate_table import by_question, plain_rows, table
from server.bench.report import BenchError, Measurement
from server.cli import main
from steering.errors import EndpointError
from steering.gate.bounds import upper_bound
from steering.gate.endpoint import Endpoint
from steering.gate.tasks import Task
from steering.gate.tools import Toolbox
from tests.steering.chat_server import ChatServer, Json, serving

CALCULATOR = {"type": "function", "function": {"name": "calculator", "parameters": {"type": "object"}}}


class GatedServer(ChatServer):
    """Calls for every sum where tools are shown; a gate suppresses where the first number is below 40, and should below 10."""

    bound = True

    def completion(self, body: Json) -> Json:
        mode = body["tool_gate"]["mode"]
        looping = body["messages"][-1]["role"] == "tool"
        first = int(re.findall(r"\d+", body["messages"][0]["content"])[0])
        reason = "off" if mode == "off" else "uncertain" if looping or first >= 40 else "confident_without_tool"
        decision = "suppress" if reason == "confident_without_tool" else "allow"
        if not self.bound:
            decision, reason = "allow", "policy_mismatch"
        shown = dict(body)
        if decision == "suppress" and mode == "enforce":
            del shown["tools"]
        asked = mode != "off" and not looping
        report = {
            "mode": mode,
            "decision": decision,
            "reason": reason,
            "score": first / 100 if asked else None,
            "probe_usage": {"prompt_tokens": 20 * asked, "completion_tokens": 7 * asked},
            "leak": first == 3,
            "latency_ms": 5.0 if asked else 0.0,
        }
        found = super().completion(shown)
        found["usage"] = {"prompt_tokens": 90, "completion_tokens": 14}
        return {**found, "gateway": {"tool_gate": report}}

    def words(self, body: Json) -> tuple[str, list[Json]]:
        if body["messages"][-1]["role"] == "tool":
            return f"The answer is {body['messages'][-1]['content']}.", []
        a, b = re.findall(r"\d+", body["messages"][-1]["content"])
        if body.get("tools"):
            function = {"name": "calculator", "arguments": json.dumps({"expression": f"{a} + {b}"})}
            return "", [{"id": "call_1", "type": "function", "function": function}]
        return str(int(a) + int(b) if int(a) < 10 else 0), []


@pytest.fixture
def gateway() -> Iterator[GatedServer]:
    server = GatedServer()
    with serving(server):
        yield server


def _task(a: int, b: int) -> Task:
    return Task.model_validate(
        {
            "id": f"{a}+{b}",
            "question": f"What is {a} + {b}?",
            "tools": (CALCULATOR,),
            "tool_kinds": {"calculator": "compute"},
            "gold": (str(a + b),),
            "executors": {"calculator": "calculator"},
        }
    )


TASKS = [_task(2, 3), _task(3, 5), _task(30, 4), _task(50, 60), _task(70, 80)]


def _values(rows: list[Measurement]) -> dict[str, tuple[float, float | None]]:
    return {row.name.strip(): (row.value, row.ratio) for row in rows}


@pytest.mark.parametrize("concurrency", [1, 3])
def test_every_question_is_asked_in_every_mode_and_the_table_says_what_came_of_it(
    gateway: GatedServer, concurrency: int
) -> None:
    episodes = asyncio.run(ask_all(gateway.url, TASKS, {}, concurrency, 32))
    found = _values(table(by_question(episodes)))
    assert found["questions"][0] == 5
    assert found["tool calls a question, off"][0] == 1
    assert found["tool calls a question, enforce"] == (0.4, 0.4)
    assert [found[f"accuracy, {mode}"][0] for mode in MODES] == [100, 100, 80]
    assert found["accuracy, enforce - off"][0] == pytest.approx(-20)
    assert found["95 % interval, low"][0] <= -20 <= found["95 % interval, high"][0] <= 0
    assert found["harm"] == (1, 0.2)
    assert found["rescue"] == (0, 0.0)
    assert found["leaks"][0] == 1
    assert found["first requests allowed"] == (2, 0.4)
    assert found["tokens of probes"] == (14, 0.5)
    assert found["first: suppress, confident_without_tool"][0] == 3
    assert found["in loops: allow, uncertain"][0] == 2


def test_modes_take_turns_and_name_the_policy(gateway: GatedServer) -> None:
    asyncio.run(ask_all(gateway.url, TASKS, {}, 1, 32))
    gates = [body["tool_gate"] for body in gateway.requests if len(body["messages"]) == 1][len(MODES) :]
    orders = [tuple(gate["mode"] for gate in gates[place : place + 3]) for place in range(0, 15, 3)]
    assert len(set(orders)) == 5
    assert all(set(order) == set(MODES) for order in orders)
    assert all(("policy" in gate) == (gate["mode"] != "off") for gate in gates)


def test_a_policy_of_another_delta_is_no_measurement(gateway: GatedServer) -> None:
    gateway.bound = False
    with pytest.raises(BenchError, match="policy_mismatch"):
        asyncio.run(ask_all(gateway.url, TASKS, {}, 1, 32))


def test_an_agent_that_never_ends_is_wrong_and_a_refusal_is_told(gateway: GatedServer) -> None:
    async def run(task: Task, rounds: int) -> Episode:
        async with Endpoint(f"{gateway.url}/v1", patience_s=()) as endpoint:
            return await Agent(endpoint, Toolbox({}, None), "m", "p", 32, rounds).run(task, "off")

    one = asyncio.run(run(TASKS[0], 1))
    assert (one.right, one.answer, one.calls) == (False, "", 1)
    gateway.fail = lambda index, body: (400, "no")
    with pytest.raises(EndpointError, match="status 400"):
        asyncio.run(run(TASKS[0], 1))


def _episode(task: str, mode: Mode, right: bool, seconds: float, decision: str = "allow", probe: int = 0) -> Episode:
    told = Round(seconds, 50, 10, 1, decision, "uncertain", probe_completion_tokens=probe, gate_ms=1000 * seconds / 2)
    return Episode(task, mode, right, "", (told, Round(1.0, 60, 4, 0, "allow", "uncertain")))


def test_costs_and_changes_are_of_pairs() -> None:
    episodes = []
    for number, (off_s, seen_s) in enumerate([(1.0, 1.5), (3.0, 3.25), (2.0, 2.125)]):
        task = str(number)
        episodes += [
            _episode(task, "off", number != 2, off_s),
            _episode(task, "observe", number != 2, seen_s, probe=3),
            _episode(task, "enforce", number != 0, seen_s, "suppress" if number == 2 else "allow"),
        ]
    episodes.append(_episode("alone", "off", True, 1.0))
    found = _values(table(by_question(episodes)))
    assert found["questions"][0] == 3
    assert found["p50 of the request, off"][0] == 2000
    assert found["p50 that observing adds"] == (250, 0.125)
    assert found["tokens of probes"] == (9, 0.3)
    assert found["harm"] == (0, 0)
    assert found["Clopper-Pearson bound, 95 %"][0] == pytest.approx(100 * upper_bound(1, 3, 0.05))  # of the rescues
    assert found["rescue"] == (1, 1 / 3)
    assert found["right otherwise though not changed"][0] == 1


def test_requests_without_tools_are_compared_by_their_medians() -> None:
    rows = plain_rows([0.3, 0.1, 0.2], [0.1, 0.1, 0.4])
    assert [(row.value, row.ratio) for row in rows] == [(100, None), (200, 2.0)]


def test_faults_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lookup = TASKS[0].model_dump(mode="json") | {"executors": {"calculator": "lookup"}}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(lookup) + "\n")
    given = ["bench", "gate", "--delta", "d", "--policy", "p", "--tasks", str(tmp_path / "tasks.jsonl")]
    assert main(given) == 1
    assert capsys.readouterr().err == "error: some tasks name the executor `lookup`; say --facts\n"
