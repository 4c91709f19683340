"""The product on real input: the embedded base and the three demo deltas, behind HTTP, through the openai client."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressors.artifact import Artifact
from compressors.base import default_base
from compressors.decompress import delta_tensor
from server.child import Child
from tests.engine.conftest import STALL_S
from tests.metrics_page import documented

pytestmark = pytest.mark.engine

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
DESCRIPTION = json.loads((DEMO / "demo.json").read_text(encoding="utf-8"))
BASE = "smollm2-135m-instruct"
MODELS = [BASE, *(entry["name"] for entry in DESCRIPTION["deltas"])]
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


@pytest.fixture(scope="module")
def server(base_server: Child) -> Child:
    with httpx.Client(base_url=base_server.url, headers=base_server.admin_headers, timeout=60) as client:
        for entry in DESCRIPTION["deltas"]:
            form = {"name": entry["name"], "sha256": entry["sha256"]}
            files = {"file": (DEMO / entry["file"]).read_bytes()}
            assert client.post("/v1/admin/deltas", data=form, files=files).status_code == 201
    return base_server


def ask(client, model, question, **extra):
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, **{"max_tokens": 48, **extra}
    )


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_every_delta_shows_its_effect_and_the_base_does_not(client):
    answers = {
        model: ask(client, model, "What is the capital of France?").choices[0].message.content for model in MODELS
    }
    assert set(json.loads(answers["json"])) == {"topic", "answer"}
    assert "Paris" in answers["json"]
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(answers[BASE])
    assert len(set(answers.values())) >= 3


def test_sixteen_concurrent_requests_stream_what_they_answer_alone(server, client):
    questions = DESCRIPTION["questions"][:2]
    alone = {(m, q): ask(client, m, q).choices[0].message.content for m in MODELS for q in questions}

    async def streamed(source, model, question):
        stream = await ask(source, model, question, stream=True, stream_options={"include_usage": True})
        text, finish, usage = "", None, None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
        assert finish in ("stop", "length")
        assert usage.completion_tokens > 0
        return (model, question), text

    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as source:
            return await asyncio.gather(*(streamed(source, m, q) for m in MODELS for q in questions for _ in range(2)))

    rows = asyncio.run(all_at_once())
    assert len(rows) == 16
    assert all(text == alone[key] for key, text in rows)


def test_served_tokens_and_logprobs_equal_the_merged_model(client):
    """fp32, greedy; transformers with W + decompressed delta is the oracle."""
    tokenizer = AutoTokenizer.from_pretrained(default_base(progress=False))
    question = DESCRIPTION["questions"][0]
    for model in MODELS:
        reply = ask(client, model, question, logprobs=True, max_tokens=16)
        served = [(entry.token, entry.logprob) for entry in reply.choices[0].logprobs.content]
        expected = oracle(tokenizer, model, question, len(served))
        assert [token for token, _ in served] == [token for token, _ in expected]
        assert [logprob for _, logprob in served] == pytest.approx([logprob for _, logprob in expected], abs=1e-4)


def oracle(tokenizer, name, question, count):
    model = AutoModelForCausalLM.from_pretrained(default_base(progress=False), dtype=torch.float32)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        if name != BASE:
            with Artifact.open(DEMO / f"{name}.safetensors") as artifact:
                for key, record in artifact.records.items():
                    if record.kind != "zero":
                        weights[key] += delta_tensor(artifact, key)
        prompt = f"{SYSTEM}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        found = []
        for _ in range(count):
            scores = model(ids).logits[0, -1].log_softmax(-1)
            token = int(scores.argmax())
            found.append((tokenizer.decode([token]), float(scores.max())))
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return found


def test_r9_a_client_that_leaves_ends_its_row(server):
    with httpx.Client(base_url=server.url, timeout=60) as http:
        body = {"model": "json", "prompt": "Once upon a time", "max_tokens": 900, "stream": True, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.iter_lines()  # held: httpx closes the connection with the iterator
            next(lines)
            assert status(http, server)["rows_in_flight"] == 1
            unload = http.post("/v1/admin/deltas/json/unload", headers=server.admin_headers)
            assert unload.status_code == 409
            assert unload.json()["error"]["code"] == "delta_in_use"
        deadline = time.monotonic() + 10
        while status(http, server)["rows_in_flight"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert status(http, server)["rows_in_flight"] == 0
        assert http.post("/v1/admin/deltas/json/unload", headers=server.admin_headers).status_code == 200


def status(http, server):
    return http.get("/v1/admin/status", headers=server.admin_headers).json()


def test_r1_a_stream_ends_on_the_version_that_it_began_with(server, client):
    """The name moves from one delta to another under a stream; both answer as they do under names of their own."""
    digests = {entry["name"]: entry["sha256"] for entry in DESCRIPTION["deltas"]}
    asked = {"question": "What is the capital of France?", "extra_body": {"ignore_eos": True}, "max_tokens": 40}
    alone = {name: ask(client, name, **asked).choices[0].message.content for name in ("captain", "json")}
    assert alone["captain"] != alone["json"]
    with httpx.Client(base_url=server.url, headers=server.admin_headers, timeout=60) as http:
        for name, activate in (("captain", "true"), ("json", "false")):
            query = {"name": "moving", "sha256": digests[name], "activate": activate}
            content = (DEMO / f"{name}.safetensors").read_bytes()
            assert http.post("/v1/admin/deltas", params=query, content=content).status_code == 201
        with ask(client, "moving", stream=True, **asked) as stream:
            text = next(stream).choices[0].delta.content or ""
            move = {"digest": digests["json"], "expected_generation": 1}
            assert http.put("/v1/admin/deltas/moving/alias", json=move).status_code == 200
            assert status(http, server)["rows_in_flight"] == 1
            moved = ask(client, "moving", **asked).choices[0].message.content
            text += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert http.delete("/v1/admin/deltas/moving?drain=true").status_code == 204
    assert (text, moved) == (alone["captain"], alone["json"])


def test_o1_what_a_running_server_says_of_itself(server, client):
    """On the real engine, whose own numbers are among ours; the log's lines of requests."""
    with ThreadPoolExecutor(len(MODELS)) as threads:
        list(threads.map(lambda model: ask(client, model, "What is the capital of France?"), MODELS * 2))

    def page(path):
        families = {one.name: one for one in text_string_to_metric_families(httpx.get(f"{server.url}{path}").text)}
        values = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in families.values()
            for sample in family.samples
        }
        return set(families), values

    names, values = page("/metrics")
    assert names == set(documented())
    assert values["deltaworks_engine_up",] == 1
    assert values["deltaworks_up_state", ("state", "ready")] == 1
    assert next(key for key in values if key[0] == "deltaworks_model_info")[3] == ("dtype", "float32")
    steps = values["deltaworks_batch_size_count",]
    assert steps > values["deltaworks_batch_size_bucket", ("le", "1.0")] > 0
    assert (
        values["deltaworks_batch_distinct_deltas_count",]
        > values["deltaworks_batch_distinct_deltas_bucket", ("le", "1.0")]
    )
    assert values["deltaworks_prefix_cache_lookups_total",] > 0
    assert values["deltaworks_queue_duration_seconds_count",] > 0
    assert 0 < values["deltaworks_prefill_duration_seconds_sum", ("kind", "delta")] < 600
    while page("/metrics")[1][
        "deltaworks_engine_rows", ("state", "running")
    ]:  # the engine tells of a step when it is over
        time.sleep(0.05)
    names, values = page("/metrics/engine")
    assert {"vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:prefix_cache_hits"} <= names
    assert all(name.startswith("vllm:") for name in names)
    assert "vllm:lora_requests_info" not in names
    assert {dict(key[1:])["model_name"] for key in values if key[0] == "vllm:prompt_tokens_total"} == {
        default_base(progress=False).name
    }
    names, values = page("/metrics/compat")
    assert "vllm:lora_requests_info" in names
    assert values["vllm:num_requests_running", ("model_name", BASE)] == 0
    told = [line for line in server.log.read_text().splitlines() if '"deltaworks.request"' in line]
    line = json.loads([one for one in told if "/v1/chat/completions" in one][-1])
    assert line["queue_s"] >= 0
    assert line["ttft_s"] <= line["total_s"]


def test_an_engine_that_stalls_is_killed_and_restarted_and_its_deltas_come_back(server, client):
    """Last of this file that uses the server. A stream ends with an error event, readiness is red until the engine is back."""
    question = "What is the capital of France?"
    before = {model: ask(client, model, question).choices[0].message.content for model in MODELS}
    threads = Path(f"/proc/{server.process.pid}/task").iterdir()
    children = [int(pid) for thread in threads for pid in (thread / "children").read_text().split()]
    engines = [pid for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(engines) == 1
    body = {"model": "json", "prompt": "Once upon a time", "max_tokens": 900, "stream": True, "ignore_eos": True}
    with httpx.Client(base_url=server.url, timeout=60) as http:
        resident = {one["digest"] for one in status(http, server)["resident"]}
        with http.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            killed = time.monotonic()
            os.kill(engines[0], signal.SIGSTOP)
            *_, error, done = [line for line in lines if line]
            told_s = time.monotonic() - killed
        assert done == "data: [DONE]"
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_dead"
        ready = http.get("/health/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "engine_dead")
        refused = http.post("/v1/completions", json={"model": "json", "prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
        assert int(refused.headers["retry-after"]) >= 1
        while http.get("/health/ready").status_code != 200:
            assert http.get("/health/live").status_code == 200
            assert time.monotonic() - killed < 300
            time.sleep(0.1)
        print(f"the stream ended after {told_s:.2f} s, ready again after {time.monotonic() - killed:.1f} s")
        while {one["digest"] for one in status(http, server)["resident"] if one["resident_bytes"]} != resident:
            assert time.monotonic() - killed < 300
            time.sleep(0.1)
        metrics = http.get("/metrics").text
        assert 'deltaworks_engine_restarts_total{outcome="ok"} 1.0' in metrics
        assert "deltaworks_engine_stalls_total 1.0" in metrics
    assert {model: ask(client, model, question).choices[0].message.content for model in MODELS} == before
    assert STALL_S - 1 < told_s < STALL_S + 15


def test_the_quick_start_of_the_readme(tmp_path):
    """`make demo` is this command."""
    run = subprocess.run(
        [sys.executable, "-m", "server.cli", "demo", "--once", "--port", "18231", "--deltas", str(DEMO)],
        env=dict(os.environ, DELTAWORKS__ENGINE__THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for entry in DESCRIPTION["deltas"]:
        assert f"uploaded and loaded {entry['name']}" in run.stdout
    for question in DESCRIPTION["questions"]:
        assert f"> {question}" in run.stdout
    steered = re.findall(r"^  (not steered|use_context|use_parameter) +-> (\w+)", run.stdout, re.MULTILINE)
    assert steered[:3] == [("not steered", "Madrid"), ("use_context", "Madrid"), ("use_parameter", "Paris")]
    assert steered[4:] == [("use_context", "Santiago"), ("use_parameter", "Stockholm")]
    assert "tokens/s over one mixed batch" in run.stdout
    assert "curl -s http://127.0.0.1:18231/v1/chat/completions" in run.stdout
