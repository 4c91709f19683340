"""Cold delta against cold model: from the end of an upload to the first token, and from process start to ready."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import httpx

from server.bench.report import Measurement
from server.child import child_server
from server.engine.base import EngineDelta

_START_TIMEOUT_S = 600


def cold_times(base: str, deltas: list[EngineDelta], dtype: str) -> list[Measurement]:
    """Start `deltaworks serve`, upload each delta, and time its first token. Medians over the deltas."""
    first_tokens = []
    with tempfile.TemporaryDirectory(prefix="deltaworks-bench-") as folder:
        started = time.perf_counter()
        with child_server(Path(folder), [base, "--dtype", dtype, "--max-model-len", "1024"]) as child:
            child.wait_ready(_START_TIMEOUT_S)
            start_s = time.perf_counter() - started
            with httpx.Client(base_url=child.url, timeout=120) as client:
                _first_token_s(client, client.get("/v1/models").json()["data"][0]["id"])  # warm-up of the base
                for i, delta in enumerate(deltas):
                    form = {"name": f"cold-{i}", "sha256": delta.digest}
                    files = {"file": Path(delta.path).read_bytes()}
                    client.post(
                        "/v1/admin/deltas", headers=child.admin_headers, data=form, files=files
                    ).raise_for_status()
                    first_tokens.append(_first_token_s(client, f"cold-{i}"))
    first = statistics.median(first_tokens)
    return [
        Measurement("server start to ready", start_s, "s"),
        Measurement("cold delta: upload done to first token", first, "s", first / start_s, "server start to ready"),
    ]


def _first_token_s(client: httpx.Client, model: str) -> float:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "stream": True}
    started = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                return time.perf_counter() - started
    raise RuntimeError(f"{model} gave no token")
