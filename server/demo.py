"""`deltaworks demo`: a server of its own, the three demo deltas uploaded through the admin API, and the same questions to all."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from server.child import Child, ChildError, child_server, interruptible
from server.demo_calls import DemoError, expect
from server.demo_steering import show_steering

_START_TIMEOUT_S = 300
_COLUMN = 34
_MAX_TOKENS = 64
_KV_BYTES = 256 << 20  # ample for twelve short rows; touching the default's gigabytes costs seconds of the start


@dataclass(frozen=True)
class Answer:
    model: str
    question: str
    text: str
    tokens: int
    seconds: float


def demo(folder: Path, port: int, once: bool) -> int:
    """Returns the exit status. Serves until Ctrl-C or SIGTERM unless `once`."""
    try:
        description = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"error: cannot read {folder}/demo.json: {error}", file=sys.stderr)
        return 1
    try:
        with (
            interruptible(),
            tempfile.TemporaryDirectory(prefix="deltaworks-demo-") as store,
            child_server(Path(store), ["--max-model-len", "2048", "--kv-cache-bytes", str(_KV_BYTES)], port) as child,
        ):
            child.wait_ready(_START_TIMEOUT_S, _show_waiting)
            print()
            _show(child, folder, description)
            if not once:
                print("\nserving until Ctrl-C")
                child.process.wait()
    except KeyboardInterrupt:
        print("\nstopped")
    except (DemoError, ChildError, httpx.HTTPError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


def _show(child: Child, folder: Path, description: dict[str, Any]) -> None:
    """Upload, ask, print."""
    deltas, questions = description["deltas"], description["questions"]
    with httpx.Client(base_url=child.url, timeout=120) as client:
        cards = _upload(client, folder, deltas, child.admin_headers)
        base = client.get("/v1/models").json()["data"][0]["id"]
    models = [base, *(entry["name"] for entry in deltas)]
    answers, seconds = asyncio.run(_ask_all(child.url, models, questions))
    _print_answers(models, questions, answers)
    _print_figures(deltas, cards, answers, seconds)
    with httpx.Client(base_url=child.url, timeout=120) as client:
        show_steering(client, folder, base, child.admin_headers)
    _print_try(child.url, models[-1], questions[1])


def _show_waiting(seconds: float) -> None:
    print(f"\rstarting the server and loading the base model ... {seconds:3.0f} s", end="", flush=True)


def _upload(
    client: httpx.Client, folder: Path, deltas: list[dict[str, Any]], headers: dict[str, str]
) -> dict[str, Any]:
    """Upload and load each delta; returns its admin card by name."""
    cards = {}
    for entry in deltas:
        data = (folder / entry["file"]).read_bytes()
        started = time.monotonic()
        form = {"name": entry["name"], "sha256": entry["sha256"]}
        reply = client.post("/v1/admin/deltas", headers=headers, data=form, files={"file": (entry["file"], data)})
        expect(reply, (200, 201))
        reply = client.post(f"/v1/admin/deltas/{entry['name']}/load", headers=headers)
        expect(reply, (200,))
        cards[entry["name"]] = reply.json()
        print(f"uploaded and loaded {entry['name']:8} {len(data) / 1e6:.1f} MB in {time.monotonic() - started:.2f} s")
    return cards


async def _ask_all(url: str, models: list[str], questions: list[str]) -> tuple[list[Answer], float]:
    """Every question to every model, all at once: one batch in the engine."""
    print(
        f"asking {len(models)} models {len(questions)} questions, all {len(models) * len(questions)} at once ...",
        flush=True,
    )
    started = time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        asked = [_ask(client, model, question) for question in questions for model in models]
        return list(await asyncio.gather(*asked)), time.monotonic() - started


async def _ask(client: httpx.AsyncClient, model: str, question: str) -> Answer:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": _MAX_TOKENS,
        "temperature": 0,
    }
    started = time.monotonic()
    reply = await client.post("/v1/chat/completions", json=body)
    expect(reply, (200,))
    found = reply.json()
    text: str = found["choices"][0]["message"]["content"]
    return Answer(model, question, text, found["usage"]["completion_tokens"], time.monotonic() - started)


def _print_answers(models: list[str], questions: list[str], answers: list[Answer]) -> None:
    by_key = {(answer.model, answer.question): answer.text for answer in answers}
    for question in questions:
        print(f"\n> {question}")
        cells = [textwrap.wrap(by_key[model, question], _COLUMN) or [""] for model in models]
        print("  ".join(f"{model:{_COLUMN}}" for model in models))
        print("  ".join("-" * _COLUMN for _ in models))
        for line in range(max(map(len, cells))):
            print("  ".join(f"{cell[line] if line < len(cell) else '':{_COLUMN}}" for cell in cells).rstrip())


def _print_figures(deltas: list[dict[str, Any]], cards: dict[str, Any], answers: list[Answer], seconds: float) -> None:
    tokens = sum(answer.tokens for answer in answers)
    print(f"\n{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s over one mixed batch\n")
    print(
        f"{'delta':10} {'file':>8} {'resident':>9}   compression: values  projections  whole file   success: base  tuned  delta"
    )
    for entry in deltas:
        active = next(v for v in cards[entry["name"]]["versions"] if v["digest"] == entry["sha256"])
        ratios, success = entry["ratios"], entry["success"]
        print(
            f"{entry['name']:10} {active['nbytes'] / 1e6:5.1f} MB {active['resident_bytes'] / 1e6:6.1f} MB"
            f"   {ratios['values']:19.1f}x {ratios['projection_bytes']:11.1f}x {ratios['whole_file']:10.1f}x"
            f"   {success['base']:13.0%} {success['fine_tune']:6.0%} {success['delta']:6.0%}"
        )


def _print_try(url: str, model: str, question: str) -> None:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0})
    print(f"\ntry:\ncurl -s {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'")
