"""`deltaworks gate streams`."""

from __future__ import annotations

import argparse
from pathlib import Path

from steering.options import integers, reporting

_EXAMPLE = """example, for a policy with the stage `hidden`:
  deltaworks gate streams tasks.jsonl runs/tune/model -o streams.safetensors
  deltaworks gate fit labels.jsonl -o policy.json --streams streams.safetensors --probe-out knows.safetensors
An interrupted run goes on with the same command.
The server reads the probe from the profile knows.safetensors: upload it before the policy.
A delta whose fine-tune is not at hand becomes a model folder by `deltaworks delta decompress`."""


def add_parser(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser(
        "streams",
        help="record what a model holds in mind at the end of each question, for a probe of it",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tasks", metavar="TASKS", type=Path, help="the questions that were labelled (.jsonl)")
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of the model that was labelled")
    parser.add_argument("-o", "--out", type=Path, required=True, help="streams to write (.safetensors)")
    parser.add_argument("--layers", type=integers, help="decoder layers, from 0: 12,13,14 (default: all)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.set_defaults(run=reporting(_run))


def _run(args: argparse.Namespace) -> int:
    from steering.gate.knows import record, write_streams
    from steering.gate.tasks import read_tasks

    part = args.out.with_name(args.out.name + ".part")
    streams = record(read_tasks(args.tasks), args.model, args.layers, args.threads, part)
    write_streams(streams, args.out)
    part.unlink(missing_ok=True)
    print(f"wrote {args.out}: {len(streams.ids)} questions, layers {min(streams.layers)} to {max(streams.layers)}")
    return 0
