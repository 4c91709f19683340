"""`deltaworks gate eval`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from steering.options import reporting

_EXAMPLE = """example:
  deltaworks gate eval policy.json fresh-labels.jsonl --json"""


def add_parser(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser(
        "eval",
        help="what a policy does to labelled questions: calls, overuse, underuse, accuracy, harm",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("policy", metavar="POLICY", type=Path)
    parser.add_argument("labels", metavar="LABELS", type=Path, help="rows that the policy was not fitted on")
    parser.add_argument("--r", type=float, default=0.75, help="as in `gate fit` (default: %(default)g)")
    parser.add_argument("--delta", type=float, default=0.1, help="of the harm's bound (default: %(default)g)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=reporting(_run))


def _run(args: argparse.Namespace) -> int:
    from steering.gate.judge import judge
    from steering.gate.labels import read_labels
    from steering.gate.policy import read_policy
    from steering.gate.tables import effects_lines, quality_lines

    judged = judge(read_policy(args.policy), read_labels(args.labels), args.r, args.delta)
    for warning in judged.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if args.json:
        print(json.dumps(asdict(judged.effects), indent=1))
    else:
        print("\n".join([*effects_lines(judged.effects), *quality_lines({"all": judged.effects.score})]))
    return 0
