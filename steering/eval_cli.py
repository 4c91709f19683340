"""`deltaworks steer eval`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steering.options import integers, layer_path, layer_sets, numbers, reporting, words

if TYPE_CHECKING:
    from steering.collected import Collected
    from steering.evaluate import Result, Setting, Trial
    from steering.profile import Profile

_EXAMPLES = """examples:
  deltaworks steer eval knowledge.safetensors --collected runs/knowledge --model /models/smollm2
  deltaworks steer eval knowledge.safetensors --collected runs/knowledge --model /models/smollm2 \\
      --sweep "12,13,14,15;13,14" --strengths 1,2,3 --shares 0.05,0.1 --sae 12=saes/layer-12 --sae 13=saes/layer-13 ...

EM_C and EM_M are the shares of all items answered as the document says and as memorised, in percent; C->M and the like are
shares of the items that were answered so without an edit."""


def add_parser(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser(
        "eval",
        help="measure what a profile does to answers, against no control, ActAdd and ICL",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("profile", metavar="PROFILE", type=Path)
    parser.add_argument("--collected", type=Path, required=True, help="the folder that the profile was fitted on")
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument(
        "--on",
        choices=["held-out", "pool"],
        help="known facts to ask (default: held-out; pool when sweeping, so that held-out facts choose nothing)",
    )
    parser.add_argument("--items", type=int, default=200, help="at most so many facts (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=integers, default=(42, 43, 44), help="of the demonstrations (default: 42,43,44)"
    )
    parser.add_argument("--kinds", type=words, default=("agree", "against"), help="of prompts (default: agree,against)")
    parser.add_argument("--shots", type=int, default=3, help="demonstrations before an item (default: %(default)s)")
    parser.add_argument("--strengths", type=numbers, help="SpARE strengths (default: the profile's)")
    parser.add_argument("--act-add", type=numbers, default=(1.0, 2.0), help="ActAdd strengths (default: 1,2)")
    parser.add_argument("--sweep", type=layer_sets, metavar="LAYERS", help='sets of layers to try: "12,13;14"')
    parser.add_argument("--shares", type=numbers, help="with --sweep and --sae: shares of mutual information to try")
    parser.add_argument("--sae", type=layer_path, action="append", metavar="L=PATH", help="with --shares; repeat")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report as JSON")
    parser.set_defaults(run=reporting(_run))


def _run(args: argparse.Namespace) -> int:
    from steering.activations import load_model, load_tokenizer
    from steering.answers import Answerer
    from steering.collected import Collected
    from steering.errors import SteeringError
    from steering.evaluate import measure, table
    from steering.profile import Profile

    profile, collected = Profile.open(args.profile), Collected.open(args.collected)
    if not profile.header.directions:
        raise SteeringError(f"{args.profile} holds a probe alone: there is no direction to steer in")
    trial = _trial(args, collected)
    model = load_model(args.model, args.threads)
    _check_width(profile, model)
    answerer = Answerer(model, load_tokenizer(args.model), args.batch_size)
    if args.sweep is None:
        results = measure(answerer, trial, _settings(args, profile, collected))
    else:
        results = _sweep(args, profile, collected, answerer, trial)
    print(f"\n{len(trial.items)} known facts, {len(trial.seeds)} draws of demonstrations, mean±std in percent")
    print(table(results))
    if args.json is not None:
        args.json.write_text(json.dumps(_report(args, trial, results), indent=1) + "\n", encoding="utf-8")
    return 0


def _trial(args: argparse.Namespace, collected: Collected) -> Trial:
    from steering.evaluate import Trial, draw

    on = args.on or ("held-out" if args.sweep is None else "pool")
    items = collected.held_out() if on == "held-out" else collected.known_pool()
    return Trial(
        draw(items, args.items), collected.pool(), args.kinds, args.seeds, args.shots, collected.settings.same_category
    )


def _settings(args: argparse.Namespace, profile: Profile, collected: Collected) -> list[Setting]:
    from steering.evaluate import Setting, act_add_edits, spare_edits

    found = []
    for direction, header in profile.header.directions.items():
        for strength in args.strengths or (header.strength,):
            tables = profile.tables(direction, strength)
            found.append(Setting("SpARE", direction, spare_edits(tables), {"strength": strength}))
        for strength in args.act_add:
            edits = act_add_edits(collected, header.layers, direction, strength)
            found.append(Setting("ActAdd", direction, edits, {"strength": strength}))
    return found


def _sweep(
    args: argparse.Namespace, profile: Profile, collected: Collected, answerer: Any, trial: Trial
) -> list[Result]:
    from steering.errors import SteeringError
    from steering.fit import FitSettings
    from steering.sweep import Grid, selections_at, selections_of, sweep

    if (args.shares is None) != (args.sae is None):
        raise SteeringError("--shares and --sae go together: other shares need the whole SAEs")
    if args.shares is None:
        selections = selections_of(profile)
    else:
        selections = selections_at(collected, dict(args.sae), args.shares, FitSettings())
    grid = Grid(args.sweep, args.strengths or (1.0, 2.0, 3.0), args.act_add)
    return sweep(answerer, collected, selections, grid, trial)


def _check_width(profile: Profile, model: Any) -> None:
    from steering.errors import ProfileError

    width = model.config.hidden_size
    if profile.header.d_in != width:
        raise ProfileError(f"the profile is for streams of width {profile.header.d_in}, the model's have {width}")


def _report(args: argparse.Namespace, trial: Trial, results: Sequence[Result]) -> dict[str, Any]:
    return {
        "profile": args.profile.name,
        "model": args.model.name,
        "items": len(trial.items),
        "seeds": list(trial.seeds),
        "shots": trial.shots,
        "rows": [asdict(result) for result in results],
    }
