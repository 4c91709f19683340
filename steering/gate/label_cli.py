"""`deltaworks gate label`."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steering.gate.signals import PROBES
from steering.options import reporting, words

if TYPE_CHECKING:
    from steering.gate.rollouts import Asking
    from steering.gate.tasks import Task

_EXAMPLE = """example:
  deltaworks gate label tasks.jsonl -o labels.jsonl --base-url http://localhost:8000/v1 --model tune \\
      --extra-body '{"tool_gate": {"mode": "off"}}'

The same command goes on where it was interrupted. steering/README.md shows a task and a label row."""


def add_parser(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser(
        "label",
        help="ask a model questions without and with tools, and record what it knows",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tasks", metavar="TASKS", type=Path, help="questions with tools and accepted answers (.jsonl)")
    parser.add_argument("-o", "--out", type=Path, required=True, help="label rows are appended here (.jsonl)")
    parser.add_argument("--base-url", required=True, help="of an OpenAI-compatible API, with its /v1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--api-key-file", type=Path)
    parser.add_argument("--extra-body", type=_object, default={}, metavar="JSON", help="added to every request")
    parser.add_argument("--facts", type=Path, help="JSON object of texts, for the executor `lookup`")
    parser.add_argument("--tool-url", help="tool server: POST {name, arguments} answers {result}")
    parser.add_argument("--concurrency", type=_positive, default=8, help="requests at once (default: %(default)s)")
    parser.add_argument("--timeout-s", type=float, default=300, help="of a request (default: %(default)g)")
    parser.add_argument(
        "--wait", type=_count, default=300, metavar="S", help="for a server that starts; 0: not (default: %(default)s)"
    )
    parser.add_argument("--k", type=_positive, default=8, help="sampled answers each way (default: %(default)s)")
    parser.add_argument(
        "--k-with",
        type=_count,
        help="sampled runs with tools, which only budgets need: 0 saves most of the time (default: k)",
    )
    parser.add_argument("--temperature", type=float, default=0.7, help="of these (default: %(default)g)")
    parser.add_argument("--answer-tokens", type=_positive, default=256, help="of an answer (default: %(default)s)")
    parser.add_argument("--max-rounds", type=_positive, default=6, help="of a run with tools (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    parser.add_argument("--skip", type=words, default=(), help=f"probes not to ask, of {', '.join(PROBES)}")
    parser.add_argument("--probe-k", type=_positive, default=5, help="samples of a probe (default: %(default)s)")
    parser.add_argument("--probe-temperature", type=float, default=0.7, help="of these (default: %(default)g)")
    parser.add_argument(
        "--probe-tokens", type=_positive, default=64, help="of a draft and a sample (default: %(default)s)"
    )
    parser.add_argument("--top-logprobs", type=_positive, default=5, help="of a draft's tokens (default: %(default)s)")
    parser.add_argument("--call-marker", default="<tool_call>", help="how a tool call begins (default: %(default)s)")
    for name in ("base-fingerprint", "delta-digest", "template-sha256", "hidden"):
        parser.add_argument(f"--{name}-at", metavar="POINTER", help="JSON Pointer to it in an answer's body")
    parser.set_defaults(run=reporting(_run))


def _run(args: argparse.Namespace) -> int:
    from steering.errors import LabelError
    from steering.gate.label import done_ids
    from steering.gate.tasks import need_facts, read_facts, read_tasks

    tasks = read_tasks(args.tasks)
    if need_facts(tasks) and args.facts is None:
        raise LabelError("some tasks name the executor `lookup`; say --facts")
    facts = read_facts(args.facts) if args.facts else {}
    asking = _asking(args)
    done = done_ids(args.out, asking)
    left = [task for task in tasks if task.id not in done]
    asyncio.run(_label(args, asking, left, facts, len(tasks) - len(left)))
    print(f"{len(tasks)} tasks are labelled, {len(left)} of them now: {args.out}")
    return 0


async def _label(args: argparse.Namespace, asking: Asking, tasks: list[Task], facts: dict[str, str], done: int) -> None:
    from tqdm import tqdm

    from steering.gate.endpoint import Endpoint
    from steering.gate.label import label
    from steering.gate.rollouts import Asker
    from steering.gate.tools import Toolbox

    key = args.api_key_file.read_text(encoding="utf-8").strip() if args.api_key_file else None
    tell = partial(tqdm.write, file=sys.stderr)
    with tqdm(total=done + len(tasks), initial=done, unit="task") as bar:
        async with (
            Endpoint(args.base_url, args.concurrency, key, args.timeout_s, start_s=args.wait, tell=tell) as model,
            Endpoint("", args.concurrency, None, args.timeout_s, start_s=args.wait, tell=tell) as tools,
        ):
            toolbox = Toolbox(facts, tools if args.tool_url else None, args.tool_url or "")
            await label(tasks, Asker(model, toolbox, asking), args.out, args.concurrency, bar.update)


def _asking(args: argparse.Namespace) -> Asking:
    from dataclasses import replace

    from pydantic import ValidationError

    from steering.errors import LabelError
    from steering.gate.policy import ProbeSettings
    from steering.gate.rollouts import Asking, Pointers
    from steering.gate.schema import reason

    unknown = [name for name in args.skip if name not in PROBES]
    if unknown:
        raise LabelError(f"--skip: {unknown[0]!r} is not one of {', '.join(PROBES)}")
    named = {name: getattr(args, f"{name}_at") for name in Pointers.__dataclass_fields__}
    try:
        probes = ProbeSettings(
            k=args.probe_k,
            temperature=args.probe_temperature,
            max_tokens=args.probe_tokens,
            top_logprobs=args.top_logprobs,
            call_marker=args.call_marker,
        )
    except ValidationError as error:
        raise LabelError(f"the probes' {reason(error)}") from error
    return Asking(
        model=args.model,
        k=args.k,
        k_with=args.k_with,
        temperature=args.temperature,
        answer_tokens=args.answer_tokens,
        max_rounds=args.max_rounds,
        seed=args.seed,
        skip=args.skip,
        probes=probes,
        pointers=replace(Pointers(), **{name: at for name, at in named.items() if at is not None}),
        extra=args.extra_body,
    )


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return found


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
