"""`deltaworks steer collect`."""

from __future__ import annotations

import argparse
from pathlib import Path

from steering.options import integers, reporting, words

_EXAMPLE = """example:
  deltaworks steer collect /models/smollm2 --layers 12,13,14,15 --out runs/knowledge
An interrupted collection goes on with the same command."""


def add_parser(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser(
        "collect",
        help="ask a model facts under contradicting documents and keep its labelled states",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="model folder")
    parser.add_argument("--layers", type=integers, required=True, help="decoder layers, from 0: 12,13,14,15")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or to go on with")
    parser.add_argument(
        "--facts",
        default="default",
        help="default, nqswap:FILE.jsonl or macnoise:FILE.jsonl (default: %(default)s)",
    )
    parser.add_argument("--pool", type=int, default=128, help="groups of facts to collect on (default: %(default)s)")
    parser.add_argument("--shots", type=integers, default=(3, 4, 5), help="numbers of demonstrations (default: 3,4,5)")
    parser.add_argument(
        "--seeds", type=integers, default=(42, 43, 44, 45, 46), help="of the demonstrations (default: 42,43,44,45,46)"
    )
    parser.add_argument(
        "--styles", type=words, default=("dss", "dso", "doo"), help="of the demonstrations (default: dss,dso,doo)"
    )
    parser.add_argument(
        "--demonstrations",
        choices=["shared", "per-item"],
        default="shared",
        help="drawn once per seed and number of shots, or for every item as the authors do, which takes about four times "
        "as long (default: %(default)s)",
    )
    parser.add_argument(
        "--any-category",
        action="store_true",
        help="take demonstrations of all categories of facts, not of the item's own (sets without categories: always so)",
    )
    parser.add_argument("--limit", type=int, help="use only so many facts, for a trial")
    parser.add_argument(
        "--probe-items", type=int, default=640, help="facts for the conflict probe (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="prompts at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.set_defaults(run=reporting(_run))


def _run(args: argparse.Namespace) -> int:
    from steering.collect import collect
    from steering.collected import CollectSettings

    settings = CollectSettings(
        model=str(args.model),
        facts=args.facts,
        layers=args.layers,
        pool=args.pool,
        shots=args.shots,
        seeds=args.seeds,
        styles=args.styles,
        demonstrations=args.demonstrations,
        same_category=not args.any_category,
        limit=args.limit,
        probe_items=args.probe_items,
    )
    found = collect(settings, args.out, args.batch_size, args.threads)
    right = sum(found.known.memorised)
    print(
        f"\n{right} of {len(found.facts)} facts are known; {len(found.known.split.pool)} groups in the pool, ", end=""
    )
    print(f"{len(found.known.split.test)} held out")
    print("style  context  memory  neither")
    for style, counts in found.counts().items():
        print(f"{style:5}  {counts['context']:7}  {counts['memory']:6}  {counts['neither']:7}")
    print(f"wrote {args.out}")
    return 0
