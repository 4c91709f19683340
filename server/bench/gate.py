"""`deltaworks bench gate`: what a tool gate saves, spoils and costs, on tasks with known answers, through the API.

serve      a gateway with the delta and its policy, in a child process
ask        every question in all three modes, one after the other, in an order that turns from question to question
compare    requests without tools, here and at a second gateway that knows no policy
tell       the table
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import httpx
from tqdm import tqdm

from server.bench.agent import MODES, Agent, Episode, Mode
from server.bench.gate_table import by_question, plain_rows, table
from server.bench.report import BenchError, Measurement, reported
from server.child import Child, child_server
from server.demo_calls import expect, upload
from steering.gate.endpoint import Endpoint
from steering.gate.tasks import Task, need_facts, read_facts, read_tasks
from steering.gate.tools import Toolbox

NAME = "gate-bench"  # of the delta and of the policy
_START_TIMEOUT_S = 600
_UNBOUND = ("no_policy", "policy_mismatch")
_ENGINE = "[engine]\nmax_model_len = 2048\nkv_cache_bytes = 268435456\n"


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write JSON where asked."""
    return reported(args.json, lambda: _measured(args))


def _measured(args: argparse.Namespace) -> list[Measurement]:
    tasks = read_tasks(args.tasks)[: args.limit]
    if need_facts(tasks) and args.facts is None:
        raise BenchError("some tasks name the executor `lookup`; say --facts")
    facts = read_facts(args.facts) if args.facts else {}
    with ExitStack() as stack:
        gated = stack.enter_context(_gateway(args, '[gate]\nmode = "enforce"\n'))
        _upload(gated, "deltas", args.delta)
        if args.profile is not None:
            _upload(gated, "profiles", args.profile)
        _upload(gated, "policies", args.policy)
        episodes = asyncio.run(ask_all(gated.url, tasks, facts, args.concurrency, args.max_tokens))
        if args.log:
            args.log.write_text("".join(json.dumps(asdict(one)) + "\n" for one in episodes), encoding="utf-8")
        rows = table(by_question(episodes))
        if args.plain:
            bare = stack.enter_context(_gateway(args, ""))
            _upload(bare, "deltas", args.delta)
            rows += plain_rows(*_without_tools((gated.url, bare.url), tasks[: args.plain], args.max_tokens))
    return rows


@contextmanager
def _gateway(args: argparse.Namespace, settings: str) -> Iterator[Child]:
    with tempfile.TemporaryDirectory(prefix="deltaworks-bench-") as folder:
        config = Path(folder) / "bench.toml"
        config.write_text(f"{_ENGINE}threads = {args.threads}\n{settings}", encoding="utf-8")
        arguments = [args.base, "--config", str(config), "--dtype", args.dtype]
        with child_server(Path(folder), arguments) as child:
            child.wait_ready(_START_TIMEOUT_S)
            yield child


def _upload(child: Child, kind: str, file: Path) -> None:
    with httpx.Client(base_url=child.url, headers=child.admin_headers, timeout=120) as client:
        upload(client, kind, NAME, file)
        if kind == "deltas":
            expect(client.post(f"/v1/admin/deltas/{NAME}/load"), (200,))


async def ask_all(
    url: str, tasks: Sequence[Task], facts: dict[str, str], concurrency: int, max_tokens: int
) -> list[Episode]:
    """Every task in every mode; `concurrency` tasks at once, the modes of a task never at the same time.

    The first task is asked once more beforehand, unmeasured. Raises EndpointError, and BenchError where the policy is not
    of this delta.
    """
    if not tasks:
        raise BenchError("there are no tasks")
    permits = asyncio.Semaphore(concurrency)
    async with Endpoint(f"{url}/v1", concurrency) as endpoint:
        agent = Agent(endpoint, Toolbox(facts, None), NAME, NAME, max_tokens)
        for mode in MODES:
            first = (await agent.run(tasks[0], mode)).rounds[0]
            if mode != "off" and (first.reason in _UNBOUND or not first.decision):
                raise BenchError(
                    f"the gate does not look at these requests: {first.reason or 'no report in the answer'}"
                )
        with tqdm(total=len(tasks), desc="asking in three modes", unit="question") as bar:

            async def ask(task: Task, order: Sequence[Mode]) -> list[Episode]:
                async with permits:
                    episodes = [await agent.run(task, mode) for mode in order]
                bar.update()
                return episodes

            turning = itertools.cycle(itertools.permutations(MODES))
            asked = await asyncio.gather(*(ask(task, order) for task, order in zip(tasks, turning, strict=False)))
    return [episode for episodes in asked for episode in episodes]


def _without_tools(urls: tuple[str, str], tasks: Sequence[Task], max_tokens: int) -> tuple[list[float], list[float]]:
    """Seconds of the tasks' questions without tools, at each gateway; which comes first turns from question to question."""
    found: tuple[list[float], list[float]] = ([], [])
    with httpx.Client(timeout=120) as client:
        for number, task in enumerate((tasks[0], *tasks)):
            for place in (0, 1) if number % 2 else (1, 0):
                body = {"model": NAME, "messages": task.dialogue, "temperature": 0, "max_tokens": max_tokens}
                started = time.perf_counter()
                expect(client.post(f"{urls[place]}/v1/chat/completions", json=body), (200,))
                if number:  # the first is warm-up
                    found[place].append(time.perf_counter() - started)
    return found
