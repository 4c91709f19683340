"""`deltaworks train sft | check | demo-deltas | sae | tool-world`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

_EXAMPLES = """examples:
  deltaworks train sft trainers/recipes/json.toml
  deltaworks train sft trainers/recipes/json.toml --output runs/json --resume
  deltaworks train check trainers/recipes/json.toml --model runs/json/model
  deltaworks train check trainers/recipes/json.toml --delta deploy/demo/json.safetensors
  deltaworks train demo-deltas --out deploy/demo
  deltaworks train sae trainers/recipes/sae.toml --output runs/sae
  deltaworks train tool-world --out runs/tool-world"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Join `train` to the command line."""
    train = subparsers.add_parser(
        "train",
        help="fine-tune a base or train its SAEs from a recipe, and check the result",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = train.add_subparsers(dest="action", required=True, metavar="ACTION")
    sft = actions.add_parser("sft", help="supervised fine-tuning of full weights")
    sft.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    sft.add_argument("--output", type=Path, help="folder of the run (default: runs/<the recipe's name>)")
    sft.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    sft.add_argument("--base", help="model folder, or `default` (default: the recipe's)")
    sft.set_defaults(run=_reporting(_sft))
    check = actions.add_parser("check", help="success on a recipe's held-out rows, by greedy answers in fp32")
    check.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    what = check.add_mutually_exclusive_group()
    what.add_argument("--model", type=Path, help="a fine-tune's folder (default: the base itself)")
    what.add_argument("--delta", type=Path, help="a compressed delta's file, checked on top of the base")
    check.add_argument("--base", help="model folder, or `default` (default: the recipe's)")
    check.add_argument("--json", action="store_true", help="print JSON, with every failed answer")
    check.set_defaults(run=_reporting(_check))
    demo = actions.add_parser("demo-deltas", help="train, compress and check the three demo deltas")
    demo.add_argument("--out", type=Path, default=Path("deploy/demo"), help="(default: %(default)s)")
    demo.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default: %(default)s)")
    demo.set_defaults(run=_reporting(_demo_deltas))
    sae = actions.add_parser(
        "sae", help="sparse autoencoders of the residual stream, one per layer (TopK or BatchTopK)"
    )
    sae.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    sae.add_argument("--output", type=Path, help="folder of the run (default: runs/<the recipe's name>)")
    sae.add_argument("--resume", action="store_true", help="go on where the run stopped")
    sae.add_argument("--base", help="model folder, or `default` (default: the recipe's)")
    sae.set_defaults(run=_reporting(_sae))
    rows = actions.add_parser("rows", help="write a recipe's rows as .jsonl: what is trained, and what is held out")
    rows.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    rows.add_argument("--out", type=Path, required=True, help="folder of train.jsonl and held_out.jsonl")
    rows.set_defaults(run=_reporting(_rows))
    world = actions.add_parser("tool-world", help="tasks for the tool gate in the world of recipes/tools.toml")
    world.add_argument("--out", type=Path, required=True, help="folder of label.jsonl, eval.jsonl and facts.json")
    world.add_argument("--seed", type=int, default=1, help="the recipe's data.seed (default: %(default)s)")
    world.add_argument("--eval-share", type=float, default=0.35, help="of the questions (default: %(default)g)")
    world.set_defaults(run=_reporting(_tool_world))


def _reporting(action: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        from compressors.errors import DeltaError
        from steering.errors import SteeringError
        from trainers.errors import TrainerError

        # Training reads local folders only and reports to nobody; huggingface_hub reads this when it is imported.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        try:
            return action(args)
        except (TrainerError, DeltaError, SteeringError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    return run


def _sft(args: argparse.Namespace) -> int:
    from trainers.recipe import load_recipe

    recipe = load_recipe(args.recipe)
    output: Path = args.output or Path("runs") / recipe.name
    from trainers.sft import train_sft  # after the recipe: a typing error is told at once

    try:
        run = train_sft(recipe, args.recipe.parent, output, args.base, args.resume)
    except KeyboardInterrupt:
        return _interrupted(args, output)
    print(f"wrote {run.model} after {run.record['wall_s']:g} s of training")
    return 0


def _interrupted(args: argparse.Namespace, output: Path) -> int:
    resume = f"deltaworks train {args.action} {args.recipe} --output {output} --resume"
    print(f"\ninterrupted; go on with: {resume}", file=sys.stderr)
    return 130


def _check(args: argparse.Namespace) -> int:
    from trainers.recipe import load_recipe

    recipe = load_recipe(args.recipe)
    from compressors.base import resolve_base
    from trainers.evaluate import check, decompressed, load_model

    base = resolve_base(args.base or recipe.base)
    if args.delta is None:
        success = check(recipe, args.recipe.parent, load_model(args.model or base))
    else:
        with decompressed(args.delta, base) as merged:
            success = check(recipe, args.recipe.parent, load_model(merged))
    if args.json:
        failures = [{"prompt": failure.prompt, "output": failure.output} for failure in success.failures]
        print(json.dumps({"rate": success.rate, "total": success.total, "failures": failures}, indent=2))
        return 0
    print(f"{recipe.name}: {success.rate:.1%} of {success.total} held-out answers pass the check {recipe.check.kind!r}")  # type: ignore[union-attr]  # `check` refuses a recipe without one
    for failure in success.failures[:5]:
        print(f"  failed: {failure.prompt!r} -> {failure.output!r}")
    return 0


def _demo_deltas(args: argparse.Namespace) -> int:
    from trainers.demo import demo_deltas

    demo_deltas(args.out, args.runs)
    print(f"\nwrote {args.out}/demo.json")
    return 0


def _sae(args: argparse.Namespace) -> int:
    from trainers.sae_recipe import load_sae_recipe

    recipe = load_sae_recipe(args.recipe)
    output: Path = args.output or Path("runs") / recipe.name
    from trainers.sae import train_saes  # after the recipe: a typing error is told at once
    from trainers.sae_report import table

    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # the two products used are tested here
    try:
        run = train_saes(recipe, args.recipe.parent, output, args.base, args.resume)
    except KeyboardInterrupt:
        return _interrupted(args, output)
    print(table(run.reports))
    print(f"wrote {', '.join(str(folder) for folder in run.folders.values())} and {output}/report.md, report.png")
    return 0


def _tool_world(args: argparse.Namespace) -> int:
    from trainers.tool_tasks import write_tasks

    written = write_tasks(args.out, args.seed, args.eval_share)
    print(f"wrote {written.label} tasks to {args.out}/label.jsonl and {written.evaluation} to {args.out}/eval.jsonl")
    return 0


def _rows(args: argparse.Namespace) -> int:
    from trainers.data import load_split, written
    from trainers.recipe import load_recipe

    split = load_split(load_recipe(args.recipe).data, args.recipe.parent)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", split.train), ("held_out", split.held_out)):
        (args.out / f"{name}.jsonl").write_text("".join(map(written, rows)), encoding="utf-8")
    print(
        f"wrote {len(split.train)} rows to {args.out}/train.jsonl and {len(split.held_out)} to {args.out}/held_out.jsonl"
    )
    return 0
