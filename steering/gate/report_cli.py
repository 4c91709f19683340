"""`deltaworks gate report`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from steering.options import reporting

_EXAMPLE = """example:
  deltaworks gate report policy.json fresh-labels.jsonl -o report     # reliability.png, risk_coverage.png"""


def add_parser(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser(
        "report",
        help="pictures of a policy: whether its scores are true, and what its threshold trades",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("policy", metavar="POLICY", type=Path)
    parser.add_argument("labels", metavar="LABELS", type=Path, help="rows that the policy was not fitted on")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--r", type=float, default=0.75, help="as in `gate fit` (default: %(default)g)")
    parser.add_argument("--delta", type=float, default=0.1, help="of the harm's bound (default: %(default)g)")
    parser.set_defaults(run=reporting(_run))


def _run(args: argparse.Namespace) -> int:
    from steering.gate.effects import scored
    from steering.gate.judge import harm_curve, judge
    from steering.gate.labels import read_labels
    from steering.gate.plots import reliability, risk_coverage
    from steering.gate.policy import read_policy

    policy = read_policy(args.policy)
    judged = judge(policy, read_labels(args.labels), args.r, args.delta)
    for warning in judged.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)
    scores, y, w = scored(judged.columns, judged.verdicts)
    if len(scores):
        reliability(scores, y, w, args.out / "reliability.png")
    points = harm_curve(policy, judged, args.delta)
    epsilon = policy.eval.epsilon if policy.eval else None
    risk_coverage(points, len(judged.rows), policy.thresholds.suppress, epsilon, args.out / "risk_coverage.png")
    for path in sorted(args.out.glob("*.png")):
        print(f"wrote {path}")
    return 0
