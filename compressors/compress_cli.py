"""`deltaworks delta compress`: settings belong to methods, and one that the chosen method lacks is an error."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressors.errors import BudgetError

Action = Callable[[argparse.Namespace], int]

_METHODS = ("impart", "lowrank", "dare", "bitdelta")
SETTINGS = ("ratio", "bytes_ratio", "beta", "c", "rule", "value_dtype", "rescale", "seed", "per_row", "rows_dtype")
_EPILOG = """methods and their settings:
  impart    importance-aware sparse SVD (the default): ratio | bytes-ratio, beta, c, value-dtype, rule, rescale, seed
  lowrank   truncated SVD: ratio | bytes-ratio, value-dtype
  dare      entries of the delta at random: ratio | bytes-ratio, value-dtype, seed
  bitdelta  the delta's signs and one scale, about 16 times smaller: per-row

--ratio counts surviving values, as the papers do; --bytes-ratio counts every byte of the projections, which is what a
disk and a network pay for. At equal bytes narrower values keep more of them: int4 holds four times as many as fp16."""


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
    parser.add_argument("--method", choices=_METHODS, default="impart", help="(default: %(default)s)")
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
    parser.add_argument("--rescale", choices=["exact", "released"], help="of the kept entries (default: exact)")
    parser.add_argument("--seed", type=int, help="of the masks (default: 0)")
    parser.add_argument("--per-row", action="store_true", default=None, help="one scale a row instead of one in all")
    parser.add_argument(
        "--rows-dtype", choices=["int8", "fp16"], help="of changed vocabulary rows, with every method (default: int8)"
    )
    parser.add_argument("--name", help="the base's name in the manifest, for people (default: the folder's)")
    parser.set_defaults(run=reporting(_compress))


def _compress(args: argparse.Namespace) -> int:
    from compressors.artifact import Artifact
    from compressors.base import resolve_base
    from compressors.compress import compress
    from compressors.inspect import summary, text

    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    compress(resolve_base(args.base), args.fine_tune, args.out, configured(args.method, given), args.name, True)
    with Artifact.open(args.out) as artifact:
        print(text(summary(artifact)))
    return 0


def configured(method: str, given: dict[str, Any]) -> Any:
    """The settings of a method. Raises BudgetError naming a setting that it does not have, and the methods that have it."""
    from compressors.methods import METHODS

    for name in given:
        having = [other for other, one in METHODS.items() if name in one.config.__dataclass_fields__]
        if method not in having:
            flag = name.replace("_", "-")
            raise BudgetError(f"--{flag} does not belong to the method {method}; it belongs to {', '.join(having)}")
    return METHODS[method].config(**given)
