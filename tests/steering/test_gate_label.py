"""Labelling against a scripted endpoint on loopback: rows, tools, interruption and resumption, and what goes wrong."""

import asyncio
import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from steering.errors import EndpointError, LabelError
from steering.gate.endpoint import Endpoint, pointed
from steering.gate.labels import LabelRow, read_labels
from steering.gate.tasks import read_facts, read_tasks
from tests.steering.chat_server import ChatServer, serving, task
from tests.steering.gate_world import gate, tool

ANSWERED = {"gateway": {"base_fingerprint": "sha256:base", "delta_digest": None, "template_sha256": "f" * 64}}


@pytest.fixture
def chat() -> Iterator[ChatServer]:
    with serving() as server:
        server.extra = ANSWERED
        yield server


def write(path: Path, *tasks: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in tasks))
    return path


def label(chat: ChatServer, tasks: Path, out: Path, *more: object) -> int:
    return gate(
        "label", tasks, "-o", out, "--base-url", f"{chat.url}/v1", "--model", "tiny", "--k", 2, "--probe-k", 3, *more
    )


def labelled(path: Path) -> dict[str, LabelRow]:
    return {row.id: row for row in read_labels(path).rows}


def test_a_known_and_an_unknown_question(chat: ChatServer, tmp_path: Path) -> None:
    tasks = write(tmp_path / "tasks.jsonl", task("easy", 2, 3), task("over", 12, 3), task("hard", 1234, 5678))
    assert label(chat, tasks, tmp_path / "labels.jsonl", "--probe-tokens", 4) == 0
    found = labelled(tmp_path / "labels.jsonl")
    easy, hard = found["easy"], found["hard"]
    assert (easy.p_known, easy.correct_without, easy.correct_with, easy.called) == (1, True, True, False)
    assert (easy.p_with, easy.n, easy.m) == (1, 0, (0, 0, 0))
    over = found["over"]
    assert (over.p_known, over.called, over.m, over.n) == (1, True, (1, 1, 1), 0)
    assert (hard.p_known, hard.correct_without, hard.correct_with, hard.called) == (0, False, True, True)
    assert (hard.p_with, hard.n, hard.m) == (1, 1, (1, 1, 1))
    assert hard.answers_with[0] == "The answer is 6912."
    assert len(hard.answers_without) == 3
    assert set(hard.features) == {"static", "peek", "draft", "samples", "ptrue"}
    assert hard.tokens == {"peek": 1, "draft": 4, "samples": 12, "ptrue": 1}
    draft = hard.features["draft"]
    assert draft["draft.mean_logprob"] == pytest.approx(math.log(0.7))
    assert (draft["draft.tokens"], draft["draft.finished"]) == (pytest.approx(math.log1p(4)), 0)
    assert hard.features["ptrue"]["ptrue.p_true"] == pytest.approx(0.75)
    assert hard.features["peek"]["peek.p_call"] == pytest.approx(0.1)
    assert hard.features["static"]["tools.compute"] > 0
    assert (hard.model.name, hard.model.base_fingerprint, hard.model.delta_digest) == ("tiny", "sha256:base", None)
    assert hard.probes is not None
    assert (hard.probes.k, hard.probes.max_tokens) == (3, 4)


def test_without_tools_means_with_those_that_a_gate_leaves(chat: ChatServer, tmp_path: Path) -> None:
    both = [tool("calculator", "Computes an expression"), tool("send_message", "Sends a message")]
    kinds = {"calculator": "compute", "send_message": "action"}
    tasks = write(tmp_path / "tasks.jsonl", task("alone", 12, 3), task("left", 12, 3, tools=both, tool_kinds=kinds))
    assert label(chat, tasks, tmp_path / "labels.jsonl") == 0
    found = labelled(tmp_path / "labels.jsonl")
    assert (found["alone"].p_known, found["alone"].correct_without) == (1, True)
    left = found["left"]
    assert (left.p_known, left.correct_without, left.correct_with, left.called) == (0, False, True, True)
    assert left.answers_without == ("I would have to ask someone.",) * 3
    assert left.features["draft"] == found["alone"].features["draft"]  # a draft is asked without any tool


def test_fewer_runs_with_tools(chat: ChatServer, tmp_path: Path) -> None:
    tasks = write(tmp_path / "tasks.jsonl", task("hard", 1234, 5678))
    assert label(chat, tasks, tmp_path / "labels.jsonl", "--k-with", 0) == 0
    hard = labelled(tmp_path / "labels.jsonl")["hard"]
    assert (hard.p_known, hard.p_with, hard.m, hard.correct_with, hard.n) == (0, None, (1,), True, 1)
    assert sum(bool(body.get("tools")) and body["max_tokens"] > 1 for body in chat.requests) == 2


def test_what_is_asked(chat: ChatServer, tmp_path: Path) -> None:
    tasks = write(tmp_path / "tasks.jsonl", task("hard", 32, 34))
    extra = '{"tool_gate": {"mode": "off"}}'
    assert label(chat, tasks, tmp_path / "labels.jsonl", "--extra-body", extra, "--answer-tokens", 99) == 0
    bodies = chat.requests
    assert all(body["tool_gate"] == {"mode": "off"} for body in bodies)
    assert all(body["path"] == "/v1/chat/completions" for body in bodies)
    plain = [body for body in bodies if "tools" not in body]
    greedy = [body for body in plain if body["temperature"] == 0]
    assert [body["max_tokens"] for body in greedy] == [99, 1]  # the answer with its draft, and P(True)
    sampled = [body for body in plain if body["temperature"] > 0]
    assert sorted(body["max_tokens"] for body in sampled) == [64, 64, 64, 99, 99]
    seeds = [body["seed"] for body in sampled]
    assert len(set(seeds)) == 5  # the probe's samples are not the label's
    rollouts = [body for body in bodies if body.get("tools") and body["max_tokens"] == 99]
    assert len(rollouts) == 3 * 2
    last = max(rollouts, key=lambda body: len(body["messages"]))["messages"]
    assert [message["role"] for message in last] == ["user", "assistant", "tool"]
    assert last[2] == {"role": "tool", "tool_call_id": "call_1", "content": "66"}


@pytest.mark.slow
def test_labels_feed_a_fit(chat: ChatServer, tmp_path: Path) -> None:
    tasks = [task(f"q{i}", *((i % 9, 1) if i % 2 else (100 + i, 17))) for i in range(60)]
    assert label(chat, write(tmp_path / "tasks.jsonl", *tasks), tmp_path / "labels.jsonl", "--k", 1) == 0
    assert gate("fit", tmp_path / "labels.jsonl", "-o", tmp_path / "policy.json", "--epsilon", 0.2) == 0
    assert gate("eval", tmp_path / "policy.json", tmp_path / "labels.jsonl") == 0


def test_an_interrupted_run_goes_on(chat: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = write(tmp_path / "tasks.jsonl", *(task(f"q{i}", i, 20) for i in range(6)))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "labels.jsonl"
    assert label(chat, tasks, whole, "--concurrency", 1) == 0
    chat.fail = lambda index, body: (400, "no more") if "What is 3" in str(body["messages"]) else None
    assert label(chat, tasks, out, "--concurrency", 1) == 1
    assert "status 400: no more" in capsys.readouterr().err
    assert set(labelled(out)) == {"q0", "q1", "q2"}
    with out.open("ab") as file:
        file.write(whole.read_bytes().splitlines()[3][:200])  # as when the power fails
    asked = len(chat.requests)
    chat.fail = lambda index, body: None
    assert label(chat, tasks, out, "--concurrency", 1) == 0
    assert "6 tasks are labelled, 3 of them now" in capsys.readouterr().out
    again = chat.requests[asked:]
    assert not any(f"What is {i} +" in str(body["messages"]) for body in again for i in range(3))
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())
    asked = len(chat.requests)
    assert label(chat, tasks, out) == 0
    assert len(chat.requests) == asked


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done(chat: ChatServer, tmp_path: Path) -> None:
    tasks, out = write(tmp_path / "tasks.jsonl", *(task(f"q{i}", i, 20) for i in range(30))), tmp_path / "labels.jsonl"
    chat.fail = lambda index, body: time.sleep(0.01)
    code = "import sys; from tests.steering.gate_world import gate; sys.exit(gate(*sys.argv[1:]))"
    command = [sys.executable, "-c", code, "label", tasks, "-o", out, "--base-url", f"{chat.url}/v1", "--model", "tiny"]
    command += ["--k", "2", "--probe-k", "3", "--concurrency", "2"]
    root = Path(__file__).parents[2]
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a test run in the background has it ignored
    with subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True, preexec_fn=heeding) as running:
        while not out.exists() or out.stat().st_size == 0:
            assert running.poll() is None
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in said
    assert 0 < len(labelled(out)) < 30
    chat.fail = lambda index, body: None
    assert label(chat, tasks, out) == 0
    assert len(labelled(out)) == 30


def test_rows_of_other_settings_are_not_mixed(
    chat: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks, out = write(tmp_path / "tasks.jsonl", task("a", 1, 2), task("b", 3, 4)), tmp_path / "labels.jsonl"
    assert label(chat, write(tmp_path / "one.jsonl", task("a", 1, 2)), out) == 0
    for more in (("--probe-k", 4), ("--k", 3), ("--model", "other"), ("--top-logprobs", 3)):
        assert label(chat, tasks, out, *more) == 1
        assert "holds rows of other settings ('a')" in capsys.readouterr().err
    out.write_text(out.read_text().replace('"p_known"', '"p_knwn"'))
    assert label(chat, tasks, out) == 1
    assert "line 1: unknown key 'p_knwn', did you mean 'p_known'?" in capsys.readouterr().err


def test_busy_servers_are_asked_again(chat: ChatServer) -> None:
    chat.fail = lambda index, body: ((503, "loading"), (429, "busy"), None)[index - 1]

    async def ask(patience_s: tuple[float, ...]) -> str:
        async with Endpoint(f"{chat.url}/v1", patience_s=patience_s) as endpoint:
            body = {"model": "m", "messages": [{"role": "user", "content": "1 + 1"}], "max_tokens": 50}
            return (await endpoint.chat(body)).text

    assert asyncio.run(ask((0.0, 0.0))).endswith("The answer is 2.")
    assert len(chat.requests) == 3
    chat.requests.clear()
    with pytest.raises(EndpointError, match="status 429: busy"):
        asyncio.run(ask((0.0,)))
    chat.requests.clear()
    chat.fail = lambda index, body: (401, "who are you")
    with pytest.raises(EndpointError, match="status 401: who are you"):
        asyncio.run(ask((0.0, 0.0)))
    assert len(chat.requests) == 1
    for text in ("<html>", "[]", '{"choices": []}', '{"choices": [{"message": {}, "logprobs": {"content": [{}]}}]}'):
        chat.fail = lambda index, body, text=text: (200, text)  # type: ignore[misc]
        with pytest.raises(EndpointError, match="answer is"):
            asyncio.run(ask(()))


def test_a_server_that_is_not_there() -> None:
    async def ask(url: str) -> None:
        async with Endpoint(url, patience_s=(0.0,)) as endpoint:
            await endpoint.chat({})

    for url in ("http://127.0.0.1:9/v1", "ftp://x", "http://[::1"):
        with pytest.raises(EndpointError):
            asyncio.run(ask(url))


def test_concurrency_is_bounded(chat: ChatServer, tmp_path: Path) -> None:
    lock, now, most = threading.Lock(), 0, 0

    def slow(index: int, body: dict[str, Any]) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.005)
        with lock:
            now -= 1

    chat.fail = slow
    tasks = write(tmp_path / "tasks.jsonl", *(task(f"q{i}", i, 20) for i in range(5)))
    assert label(chat, tasks, tmp_path / "labels.jsonl", "--concurrency", 3) == 0
    assert 2 <= most <= 3


def test_probes_that_the_server_cannot_answer_are_left_out(chat: ChatServer, tmp_path: Path) -> None:
    chat.logprobs = False
    tasks = write(tmp_path / "tasks.jsonl", task("a", 1, 2))
    assert label(chat, tasks, tmp_path / "a.jsonl") == 0
    assert set(labelled(tmp_path / "a.jsonl")["a"].features) == {"static", "samples"}
    chat.logprobs = True
    assert label(chat, tasks, tmp_path / "b.jsonl", "--skip", "samples,peek") == 0
    assert set(labelled(tmp_path / "b.jsonl")["a"].features) == {"static", "draft", "ptrue"}


def test_where_the_server_says_what_it_is(chat: ChatServer, tmp_path: Path) -> None:
    chat.extra = {"served": {"a/b": "sha256:x", "delta": "d" * 64}, "tool_gate": {"signals": {"hidden.score": 0.25}}}
    pointers = ("--base-fingerprint-at", "/served/a~1b", "--delta-digest-at", "/served/delta", "--hidden-at")
    tasks = write(tmp_path / "tasks.jsonl", task("a", 1, 2))
    assert label(chat, tasks, tmp_path / "a.jsonl", *pointers, "/tool_gate/signals/hidden.score") == 0
    row = labelled(tmp_path / "a.jsonl")["a"]
    assert (row.model.base_fingerprint, row.model.delta_digest) == ("sha256:x", "d" * 64)
    assert row.model.template_sha256 is None
    assert row.features["hidden"] == {"hidden.score": 0.25}
    assert row.tokens["hidden"] == 1


def test_what_the_gateway_says_is_read_where_it_says_it(chat: ChatServer, tmp_path: Path) -> None:
    """The template of answers with tools, by which a policy is found, and the score of a probe at the prompt without them."""

    def extra(body: dict[str, Any]) -> dict[str, Any]:
        shown = {"template_sha256": ("a" if body.get("tools") else "b") * 64, "base_fingerprint": "sha256:base"}
        return {"gateway": {**shown, "conflict": {"score": 0.75 if body.get("tools") else 0.25}}}

    chat.told = extra
    tasks = write(tmp_path / "tasks.jsonl", task("a", 1234, 5678))
    assert label(chat, tasks, tmp_path / "a.jsonl") == 0
    row = labelled(tmp_path / "a.jsonl")["a"]
    assert row.model.template_sha256 == "a" * 64
    assert row.features["hidden"] == {"hidden.score": 0.25}


def test_pointers() -> None:
    body = {"a": [{"b": None}], "~": {"": 1}}
    assert pointed(body, "/a/0/b") == (True, None)
    assert pointed(body, "/~0/") == (True, 1)
    assert pointed(body, "/a/1/b") == pointed(body, "/a/x") == pointed(body, "/c") == (False, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tool": []}, "unknown key 'tool', did you mean 'tools'?"),
        ({"gold": []}, "gold: "),
        ({"gold": "5"}, "gold: "),
        ({"tools": []}, "tools: "),
        ({"tools": [tool("a"), tool("a")]}, "tools: every tool needs a name of its own"),
        ({"tool_kinds": {"calculater": "compute"}}, "no tool 'calculater', did you mean 'calculator'?"),
        ({"tool_kinds": {"calculator": "maths"}}, "tool_kinds.calculator: "),
        ({"executors": {"calculator": "python"}}, "executors.calculator: "),
        ({"executors": {"calc": "lookup"}}, "executors: there is no tool 'calc'"),
        ({"tool_results": {"calculator": {"{a": 1}}}, "tool_results.calculator: '{a' is not JSON"),
        ({"question": ""}, "either question or messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "either question or messages"),
        ({"question": "", "messages": [{"role": "system"}]}, "the last one must be the user's"),
        ({"id": 7}, "id: "),
    ],
)
def test_bad_tasks_are_named_by_line_and_field(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "tasks.jsonl", task("a", 1, 2), {**task("b", 1, 2), **change})
    with pytest.raises(LabelError, match=r"tasks\.jsonl, line 2: ") as refused:
        read_tasks(path)
    assert message in str(refused.value)


def test_mistakes_on_the_command_line(chat: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    looking = write(tmp_path / "looking.jsonl", task("a", 1, 2, executors={"calculator": "lookup"}))
    plain, out, listed = (
        write(tmp_path / "plain.jsonl", task("a", 1, 2)),
        tmp_path / "out.jsonl",
        tmp_path / "list.json",
    )
    listed.write_text("[]")
    for tasks, more, message in (
        (looking, (), "say --facts"),
        (looking, ("--facts", listed), "must be one JSON object of texts"),
        (looking, ("--facts", tmp_path / "none.json"), "cannot read the facts"),
        (plain, ("--skip", "drafts"), "'drafts' is not one of"),
        (plain, ("--top-logprobs", 21), "the probes' top_logprobs: "),
        (plain, ("--api-key-file", tmp_path / "none"), "No such file"),
        (tmp_path / "none.jsonl", (), "cannot read"),
    ):
        assert label(chat, tasks, out, *more) == 1
        assert message in capsys.readouterr().err
    assert not out.exists()
    assert chat.requests == []
    for more in (("--extra-body", "[]"), ("--extra-body", "{"), ("--k", 0), ("--concurrency", "x")):
        with pytest.raises(SystemExit):
            label(chat, plain, out, *more)
    assert read_facts(write(tmp_path / "facts.json", {"a": "b"})) == {"a": "b"}
