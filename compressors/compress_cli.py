"""`deltaworks delta compress`: settings belong to methods, and one that the chosen method lacks is an error."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressors.errors import BudgetError

Action = Callable[[argparse.Namespace], int]

_METHODS = ("impart", "impart-qt", "lowrank", "dare", "bitdelta")
_SEQUENCE = 256  # tokens of a calibration sequence
_STEPS = 200  # of distillation, as BitDelta's authors take
SETTINGS = (
    "ratio",
    "bytes_ratio",
    "beta",
    "c",
    "rule",
    "value_dtype",
    "accounting",
    "rescale",
    "mask",
    "seed",
    "per_row",
    "rows_dtype",
)
_EPILOG = """methods and their settings:
  impart    importance-aware sparse SVD (the default): ratio | bytes-ratio, beta, c, value-dtype, mask, rule, rescale,
            seed
  impart-qt the same in 8, 3 and 2 bits by singular order: ratio | bytes-ratio, beta, c, mask, rule, accounting, rescale,
            seed; rounded by activations with --calibration
  lowrank   truncated SVD: ratio | bytes-ratio, value-dtype
  dare      entries of the delta at random: ratio | bytes-ratio, value-dtype, mask, seed
  bitdelta  the delta's signs and one scale, about 16 times smaller: per-row; scales tuned on --calibration with distil,
            distil-steps, seed

--ratio counts surviving values (impart-qt: their bits against 16), as the papers do; --bytes-ratio counts every byte of
the projections, which is what a disk and a network pay for. At equal bytes narrower values keep more of them: int4 holds
four times as many as fp16. Masks that are written out (bitmask, gap8) are counted too.

--auto --calibration FILE tries all of them at --bytes-ratio (32 unless given) and keeps what is closest to the fine-tune by the
KL divergence of its next tokens, not by the error of its weights."""


def add_parser(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], reporting: Callable[[Action], Action]
) -> None:
    """Join `compress` to `deltaworks delta`."""
    parser = actions.add_parser(
        "compress",
        help="compress FINE_TUNE - BASE into one delta file",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", metavar="BASE", help="model folder, or `default`")
    parser.add_argument("fine_tune", metavar="FINE_TUNE", type=Path, help="model folder of the full fine-tune")
    parser.add_argument("-o", "--out", type=Path, required=True, help="file to write (.safetensors)")
    parser.add_argument("--method", choices=_METHODS, help="(default: impart; with --auto: all of them)")
    parser.add_argument(
        "--auto",
        action="store_true",
        help="try methods and settings at --bytes-ratio, keep what is closest to the fine-tune on --calibration",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--ratio", type=float, help="dense values per surviving value (default: 32)")
    size.add_argument("--bytes-ratio", type=float, help="dense bytes per stored byte of the projections")
    parser.add_argument("--beta", type=float, help="share of singular triples pruned first (default: 0.6)")
    parser.add_argument(
        "--c", type=float, help="how strongly small singular values are dropped; 0 is rank truncation (default: 1)"
    )
    parser.add_argument("--value-dtype", choices=["fp16", "bf16", "int8", "int4"], help="(default: int8)")
    parser.add_argument(
        "--rule",
        choices=["exact", "released"],
        help="exact meets the ratio for every shape; released is the authors' code (default: exact)",
    )
    _add_settings(parser)
    parser.add_argument(
        "--rows-dtype", choices=["int8", "fp16"], help="of changed vocabulary rows, with every method (default: int8)"
    )
    parser.add_argument("--name", help="the base's name in the manifest, for people (default: the folder's)")
    parser.set_defaults(run=reporting(_compress))


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Of calibration, masks and scales."""
    parser.add_argument(
        "--accounting",
        choices=["exact", "released"],
        help="of impart-qt: 3 bits are charged as 3, or as 4 (default: exact)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="TEXT",
        help="text, or chats as .jsonl, to run the fine-tune on: what it was made for is best",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        metavar="N",
        help="to take from its start, in sequences of 256 (default: 8192)",
    )
    parser.add_argument("--rescale", choices=["exact", "released"], help="of the kept entries (default: exact)")
    parser.add_argument(
        "--mask",
        choices=["auto", "seeded", "bitmask", "gap8"],
        help="how it is stored which entries are kept: by their seed, a bit an entry, or a byte a kept entry "
        "(default: auto, by their seed)",
    )
    parser.add_argument("--seed", type=int, help="of the masks (default: 0)")
    parser.add_argument("--per-row", action="store_true", default=None, help="one scale a row instead of one in all")
    parser.add_argument(
        "--distil",
        action="store_true",
        help="of bitdelta: tune the scales until the logits on --calibration are the fine-tune's",
    )
    parser.add_argument("--distil-steps", type=int, metavar="N", help="of 512 tokens each (default: 200)")


def _compress(args: argparse.Namespace) -> int:
    from compressors.artifact import Artifact
    from compressors.base import resolve_base
    from compressors.compress import compress
    from compressors.inspect import summary, text

    calibration = _calibration(args)
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None} | _distilling(args)
    base = resolve_base(args.base)
    if args.auto:
        _search(base, args, given, calibration)
    else:
        config = configured(args.method or "impart", given)
        compress(base, args.fine_tune, args.out, config, args.name, True, calibration)
    with Artifact.open(args.out) as artifact:
        print(text(summary(artifact)))
    return 0


def _search(base: Path, args: argparse.Namespace, given: dict[str, Any], calibration: Any) -> None:
    """Raises BudgetError for settings that the search itself chooses."""
    from compressors.search import candidates, search

    ratio = given.get("bytes_ratio", 32.0)
    if "ratio" in given:
        raise BudgetError("--auto compares at equal bytes: give --bytes-ratio in place of --ratio")
    if chosen := [name for name in given if name not in ("bytes_ratio", "seed", "rows_dtype")]:
        raise BudgetError(f"--auto chooses --{chosen[0].replace('_', '-')} itself; leave one of them out")
    if calibration is None:
        raise BudgetError("--auto needs a text to judge by: name one with --calibration")
    tried = candidates(ratio, given.get("seed", 0), given.get("rows_dtype", "int8"), args.method)
    trials = search(base, args.fine_tune, args.out, tried, ratio, calibration, args.name, True)
    print(f"{'KL to the fine-tune':>20}  {'bytes':>12}")
    for trial in trials:
        print(f"{trial.kl:>20.5f}  {trial.nbytes:>12,}  {trial.label}{'' if trial.fits else '  (too large)'}")


def _distilling(args: argparse.Namespace) -> dict[str, int]:
    """Raises BudgetError."""
    steps = args.distil_steps
    if not args.distil:
        if steps is not None:
            raise BudgetError("--distil-steps needs --distil")
        return {}
    if args.auto:
        raise BudgetError("--auto judges bitdelta as it is; add --distil to --method bitdelta in a run of its own")
    if args.calibration is None:
        raise BudgetError("--distil needs a text: name one with --calibration")
    if steps is not None and steps < 1:
        raise BudgetError(f"--distil-steps must be 1 or more, got {steps}")
    return {"distil": steps or _STEPS}


def _calibration(args: argparse.Namespace) -> Any:
    """Raises BudgetError."""
    from compressors.calibration import Calibration

    tokens = args.calibration_tokens
    if args.calibration is None:
        if tokens is not None:
            raise BudgetError("--calibration-tokens needs a text: name one with --calibration")
        return None
    if args.method != "impart-qt" and not args.auto and not args.distil:
        raise BudgetError(
            f"--calibration belongs to --auto, --distil and the method impart-qt, not to {args.method or 'impart'}"
        )
    if tokens is not None and tokens < _SEQUENCE:
        raise BudgetError(f"--calibration-tokens must be {_SEQUENCE} or more, got {tokens}")
    return Calibration(args.calibration, (tokens or 32 * _SEQUENCE) // _SEQUENCE, _SEQUENCE)


def configured(method: str, given: dict[str, Any]) -> Any:
    """The settings of a method. Raises BudgetError naming a setting that it does not have, and the methods that have it."""
    from compressors.methods import METHODS

    for name in given:
        having = [other for other, one in METHODS.items() if name in one.config.__dataclass_fields__]
        if method not in having:
            flag = name.replace("_", "-")
            raise BudgetError(f"--{flag} does not belong to the method {method}; it belongs to {', '.join(having)}")
    return METHODS[method].config(**given)
