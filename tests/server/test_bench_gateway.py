"""The bench of the HTTP side: its client against a gateway over the fake engine, its figures, and what it starts and ends."""

import argparse
import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from server.bench.gateway import OVER, WITHIN, _round, beside, compared, figures
from server.bench.http_load import Asked, HttpLoad, Round, run_load, zipf
from server.bench.http_servers import Served, cpu_seconds, engine_settings, engine_words
from server.bench.report import BenchError
from server.child import Child, child_process
from server.config import Settings
from tests.steering.chat_server import task


@pytest.fixture
def settings() -> Settings:
    """Open, as the bench's own servers are."""
    return Settings()


def load(count: int = 6, **fields: Any) -> HttpLoad:
    return HttpLoad("load", ("tiny-base",) * count, 4, 3, **fields)


def test_a_closed_loop_counts_every_token_of_the_stream(live: Any) -> None:
    live.house.tokenizer.vocab_size = 50_000
    made = asyncio.run(run_load(live.url, load(clients=2), 0))
    assert [one.error for one in made.asked] == [None] * 6
    assert [(one.tokens, len(one.gaps_s)) for one in made.asked] == [(3, 2)] * 6
    assert all(0 < one.ttft_s <= one.total_s <= made.seconds for one in made.asked)
    assert made.tokens_per_s == pytest.approx(3 * made.requests_per_s)
    prompts = [tuple(call[0]) for call in live.house.engine.calls]
    assert len(set(prompts)) == 6
    assert {len(prompt) for prompt in prompts} == {4}
    assert live.wait_idle()


def test_errors_are_counted_not_timed(live: Any) -> None:
    live.house.tokenizer.vocab_size = 50_000
    live.house.engine.fail_at = 2
    broken = asyncio.run(run_load(live.url, load(2, clients=1), 0))
    assert [one.error is not None and "engine failed" in one.error for one in broken.asked] == [True, True]
    absent = HttpLoad("load", ("nobody",), 4, 3, 1)
    refused = asyncio.run(run_load(live.url, absent, 0)).asked[0]
    assert refused.error is not None
    assert refused.error.startswith("404")
    found = {one.name: one.value for one in figures([broken])}
    assert found["errors"] == 2
    assert found["requests"] == 0
    assert math.isnan(found["first token p50"])
    assert live.wait_idle()


def test_arrivals_are_poisson_and_the_same_for_both_servers() -> None:
    poisson = load(2000, rate=4.0)
    assert poisson.arrivals_s(1) == poisson.arrivals_s(1) != poisson.arrivals_s(2)
    assert poisson.arrivals_s(1)[-1] == pytest.approx(2000 / 4.0, rel=0.1)
    assert load(3, clients=1).arrivals_s(1) == [0.0] * 3


def test_the_rival_has_our_engines_settings_and_a_name_of_its_own(tmp_path: Path) -> None:
    args = argparse.Namespace(dtype="bfloat16", max_num_seqs=7, threads=1)
    words = engine_words(tmp_path, engine_settings(args, 8))
    assert words[words.index("--max-num-seqs") + 1] == "7"
    assert not {"--served-model-name", "--model", "--enable-lora", "--worker-extension-cls"} & set(words)


def test_a_server_that_answers_nothing_is_told(live: Any, child: Child) -> None:
    live.house.tokenizer.vocab_size = 50_000
    live.house.engine.fail_at = 0
    with pytest.raises(BenchError, match=r"answered nothing of load: .*engine failed"):
        asyncio.run(_round(Served(child), load(2, clients=1), 0))


def test_zipf_falls_with_the_rank() -> None:
    picked = zipf([f"d{n}" for n in range(64)], 20_000, 0)
    counts = [picked.count(f"d{n}") for n in range(64)]
    assert counts[0] / counts[1] == pytest.approx(2.0, rel=0.15)
    assert counts[0] / counts[9] == pytest.approx(10.0, rel=0.2)


def test_ratios_are_ours_over_theirs() -> None:
    def rounds(speed: float) -> list[Round]:
        asked = Asked(ttft_s=0.1 / speed, total_s=0.4 / speed, gaps_s=(0.1, 0.1), tokens=3)
        return [Round(1 / speed, (asked,) * 4, 0.012)] * 3

    rows = {row.name: row for row in compared({"gateway": {"a": rounds(0.5)}, "vLLM's server": {"a": rounds(1.0)}})}
    assert rows["gateway, a: output"].value == pytest.approx(6.0)
    assert rows["gateway, a: output"].ratio == pytest.approx(0.5)
    assert rows["gateway, a: first token p50"].ratio == pytest.approx(2.0)
    assert rows["gateway, a: between tokens p99"].value == pytest.approx(100.0)
    assert rows["gateway, a: CPU"].value == pytest.approx(1.0)
    assert rows["vLLM's server, a: output"].ratio is None
    assert rows["gateway, a: errors"].value == 0
    over = {row.name: row for row in beside({WITHIN: rounds(1.0), OVER: rounds(0.25)})}
    assert over[f"{OVER}: output"].ratio == pytest.approx(0.25)
    assert over[f"{OVER}: output"].ratio_to == WITHIN


@pytest.mark.slow
def test_the_cpu_time_is_of_the_whole_session_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    burn = "import time; e = time.process_time() + 0.3\nwhile time.process_time() < e: pass\nprint('x', flush=True)"
    script = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {burn!r}]); time.sleep(60)"
    with child_process([sys.executable, "-c", script], os.environ, tmp_path / "log") as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "log").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert 0.3 <= cpu_seconds(process.pid) < 10
    assert ended(process.pid)


@pytest.mark.parametrize(("bench", "servers"), [pytest.param("gateway", 2, marks=pytest.mark.engine), ("gate", 1)])
def test_sigterm_ends_a_bench_and_its_servers(bench: str, servers: int, tmp_path: Path) -> None:
    """While they start."""
    (tmp_path / "tasks.jsonl").write_text(json.dumps(task("sum", 1, 2)))
    gate = ("--base", "none", "--delta", "none", "--policy", "none", "--tasks", str(tmp_path / "tasks.jsonl"))
    command = [sys.executable, "-m", "server.cli", "bench", bench, *(("--no-zipf",) if bench == "gateway" else gate)]
    environment = dict(os.environ, TMPDIR=str(tmp_path))
    running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*/*.log"))) < servers and time.monotonic() < deadline:
        time.sleep(0.1)
    started = [int(path.name) for path in Path("/proc").glob("[0-9]*") if _parent(path) == running.pid]
    assert len(started) == servers
    running.send_signal(signal.SIGTERM)
    _, told = running.communicate(timeout=90)
    assert running.returncode == 130
    assert told.endswith("stopped\n")
    assert [ended(session) for session in started] == [True] * servers
    assert not list(tmp_path.glob("deltaworks-bench-*"))


def ended(session: int) -> bool:
    deadline = time.monotonic() + 10
    while cpu_seconds(session) and time.monotonic() < deadline:  # until all are waited for
        time.sleep(0.05)
    return cpu_seconds(session) == 0


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
