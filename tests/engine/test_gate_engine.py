"""The tool gate on the real engine: its probes read what labels read, and rows beside them answer as alone."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from compressors.base import default_base
from server.child import Child
from steering.gate.knows import open_streams
from steering.profile import Profile
from tests.steering.gate_world import gate, rows, stage, tool, write_rows

pytestmark = pytest.mark.engine

PROFILE = Path(__file__).parents[2] / "deploy/demo/steering/knowledge.safetensors"
QUESTIONS = ("What is the capital of France?", "What did Aunt Mabel's third parrot eat on 7 May 1931?")
DRAFT_TOKENS = 24
ENFORCED = {"mode": "enforce", "explain": True}


@pytest.fixture(scope="module")
def client(base_server: Child) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base_server.url, timeout=300, headers=base_server.admin_headers) as client:
        yield client


def ask(client: httpx.Client, question: str, **fields: Any) -> dict[str, Any]:
    sent = {"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": question}], "temperature": 0}
    response = client.post("/v1/chat/completions", json={**sent, "max_tokens": 32, **fields})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def with_tools(**gate: Any) -> dict[str, Any]:
    return {"tools": [tool("search", "Searches the web")], "tool_gate": gate or {"mode": "off"}}


def upload(client: httpx.Client, kind: str, name: str, content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()
    form = {"name": name, "sha256": digest}
    response = client.post(f"/v1/admin/{kind}", data=form, files={"file": (name, content)})
    assert response.status_code in (200, 201), response.text
    return digest


def policy(client: httpx.Client, stages: list[dict[str, Any]], **probes: Any) -> bytes:
    """Bound to what answers, as a label would say it; slow machines get their time."""
    shown = ask(client, "hi", max_tokens=1, **with_tools())["gateway"]
    bound = {key: shown[key] for key in ("base_fingerprint", "delta_digest", "template_sha256")}
    made = {
        "model": bound,
        "tool_kinds": [{"match": "search", "kind": "lookup"}],
        "stages": stages,
        "thresholds": {"suppress": 0.5},
        "probes": {"max_tokens": DRAFT_TOKENS, "top_logprobs": 1, "timeout_ms": 120_000, **probes},
    }
    return json.dumps(made).encode()


def confidence(client: httpx.Client, question: str, tokens: int = DRAFT_TOKENS) -> float:
    """Mean log-probability of the direct answer's first tokens, as a client reads it."""
    choice = ask(client, question, max_tokens=tokens, logprobs=True, top_logprobs=1)["choices"][0]
    found = choice["logprobs"]["content"]
    return float(sum(token["logprob"] for token in found) / len(found))


def text(body: dict[str, Any]) -> str:
    return str(body["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def drafting(client: httpx.Client) -> dict[str, float]:
    """A policy that parts the two questions by their drafts; the confidences that it was made from."""
    found = {question: confidence(client, question) for question in QUESTIONS}
    assert found[QUESTIONS[0]] > found[QUESTIONS[1]] + 0.05
    middle = sum(found.values()) / 2
    stages = [stage("static", 0, 0, 0.1, 0.9), stage("draft", 50, -50 * middle)]
    upload(client, "policies", "gate", policy(client, stages, order=["draft"]))
    return found


def test_one_question_loses_its_tools_and_one_keeps_them(client: httpx.Client, drafting: dict[str, float]) -> None:
    direct = text(ask(client, QUESTIONS[0]))
    known, unknown = (ask(client, question, **with_tools(**ENFORCED)) for question in QUESTIONS)
    told = known["gateway"]["tool_gate"]
    assert (told["decision"], told["reason"], told["stage"]) == ("suppress", "confident_without_tool", "draft")
    assert text(known) == direct
    assert told["signals"]["draft.mean_logprob"] == pytest.approx(drafting[QUESTIONS[0]], abs=1e-4)
    assert 0 < told["probe_usage"]["completion_tokens"] <= DRAFT_TOKENS
    told = unknown["gateway"]["tool_gate"]
    assert (told["decision"], told["tools_removed"]) == ("allow", [])
    written = told["probe_usage"]["completion_tokens"]
    assert told[
        "stopped"
    ]  # its first tokens settle it: even certain ones behind them would not make up for their doubt
    assert 0 < written < DRAFT_TOKENS
    first = confidence(client, QUESTIONS[1], written)
    assert told["signals"]["draft.mean_logprob"] == pytest.approx(first, abs=1e-4)
    assert first * written / DRAFT_TOKENS < sum(drafting.values()) / 2  # no end of it could have reached the threshold
    ungated = ask(client, QUESTIONS[1], **with_tools())
    assert unknown["choices"][0]["message"] == ungated["choices"][0]["message"]
    assert unknown["usage"]["prompt_tokens"] == ungated["usage"]["prompt_tokens"]


def test_rows_beside_probes_answer_as_alone(client: httpx.Client, drafting: dict[str, float]) -> None:
    plain = text(ask(client, "Name three colours."))
    ungated = text(ask(client, QUESTIONS[0], **with_tools()))
    with ThreadPoolExecutor(6) as threads:
        gated = [threads.submit(ask, client, question, **with_tools(**ENFORCED)) for question in QUESTIONS]
        others = [threads.submit(ask, client, "Name three colours.") for _ in range(2)]
        tooled = [threads.submit(ask, client, QUESTIONS[0], **with_tools()) for _ in range(2)]
        assert [one.result()["gateway"]["tool_gate"]["decision"] for one in gated] == ["suppress", "allow"]
        assert [text(one.result()) for one in others] == [plain] * 2
        assert [text(one.result()) for one in tooled] == [ungated] * 2


def test_the_hidden_probe_reads_the_score_that_a_label_reads(client: httpx.Client, drafting: dict[str, float]) -> None:
    profile = upload(client, "profiles", "knows", PROFILE.read_bytes())
    conflict = {"score": True, "profile": "knows"}
    label = ask(client, QUESTIONS[0], conflict=conflict, max_tokens=1)["gateway"]["conflict"]["score"]
    scored = {**stage("draft"), "name": "hidden", "features": [{"name": "hidden.score", "mean": 0, "std": 1}]}
    stages = [stage("static", 0, 0, 0.1, 0.9), scored]
    content = policy(client, stages, order=["hidden"], hidden_profile=profile)
    upload(client, "policies", "hidden", content)
    told = ask(client, QUESTIONS[0], **with_tools(**ENFORCED, policy="hidden"))["gateway"]["tool_gate"]
    assert told["signals"]["hidden.score"] == pytest.approx(label, abs=1e-5)
    assert told["stage"] == "hidden"
    assert 0 < label < 1


def test_a_probe_that_a_fit_wrote_scores_on_the_engine_as_it_did_there(client: httpx.Client, tmp_path: Path) -> None:
    """From streams of the model folder to a profile without directions, and to the score of a request."""
    tasks, labels = tmp_path / "tasks.jsonl", tmp_path / "labels.jsonl"
    found, lines = rows(100, stages=()), []
    for number, row in enumerate(found):
        row["p_known"] = float(number % 2)
        question = f"What is {number} plus {number}?" if number % 2 else f"Who was born on day {number} of 1713?"
        search = {"tools": [tool("search")], "tool_kinds": {"search": "lookup"}}
        lines.append({"id": row["id"], "question": question, "gold": ["0"], **search})
    tasks.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_rows(labels, found)
    bound = ask(client, "hi", max_tokens=1, **with_tools())["gateway"]["base_fingerprint"]
    streams, profile = tmp_path / "streams.safetensors", tmp_path / "knows.safetensors"
    assert gate("streams", tasks, default_base(progress=False), "-o", streams, "--layers", "9", "--threads", 2) == 0
    fitted = ("--streams", streams, "--probe-out", profile, "--stages", "hidden", "--base-fingerprint", bound)
    assert gate("fit", labels, "-o", tmp_path / "policy.json", *fitted) == 0
    upload(client, "profiles", "written", profile.read_bytes())
    probe = Profile.open(profile).probe
    assert probe is not None
    offline = dict(zip((line["id"] for line in lines), probe.score(open_streams(streams).layers[9]), strict=True))
    for line in lines[:6]:
        conflict = {"score": True, "profile": "written"}
        score = ask(client, line["question"], conflict=conflict, max_tokens=1)["gateway"]["conflict"]["score"]
        assert score == pytest.approx(float(offline[line["id"]]), abs=0.02)
        assert (score > 0.5) is (line["question"].startswith("What"))
