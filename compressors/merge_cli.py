"""`deltaworks delta merge`: several deltas of one base as one file."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressors.compress_cli import SETTINGS, configured
from compressors.errors import BudgetError

Action = Callable[[argparse.Namespace], int]

_EPILOG = """methods:
  ta     Task Arithmetic: base + scale * (sum of weight * delta), without loss; as large as the files together, and their masks
  ties   keep each delta's largest entries, elect a sign for every entry, average what agrees; dense, so better with --compress

examples:
  deltaworks delta merge maths.safetensors chat.safetensors -o both.safetensors --base default
  deltaworks delta merge a.safetensors b.safetensors -o ab.safetensors --base default --weights 0.7,0.3
  deltaworks delta merge a.safetensors b.safetensors -o minus.safetensors --base default --weights=1,-0.5
  deltaworks delta merge a.safetensors b.safetensors -o ties.safetensors --base default --method ties --retain 0.6 --scale 0.8
  deltaworks delta merge a.safetensors b.safetensors -o small.safetensors --base default --method ties \\
      --compress impart --bytes-ratio 32 --value-dtype int4

Any delta files of the same base can be merged, whatever their method, merged ones and imported LoRAs too. A weight that
begins with a minus needs the form --weights=-1,1."""


def add_parser(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], reporting: Callable[[Action], Action]
) -> None:
    """Join `merge` to `deltaworks delta`."""
    parser = actions.add_parser(
        "merge",
        help="merge several deltas of one base into one delta file",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", metavar="DELTA", type=Path, nargs="+", help="delta files (.safetensors)")
    parser.add_argument("-o", "--out", type=Path, required=True, help="file to write (.safetensors)")
    parser.add_argument("--base", required=True, help="model folder of the base of all deltas, or `default`")
    parser.add_argument("--method", choices=["ta", "ties"], default="ta", help="(default: %(default)s)")
    parser.add_argument("--weights", metavar="W,W,...", help="one number a delta, in their order (default: 1 each)")
    parser.add_argument("--scale", type=float, help="lambda, of the merged delta (default: 1)")
    parser.add_argument(
        "--retain",
        type=float,
        help="ties: share of entries that every delta keeps, above 0 and at most 1 (default: 0.6)",
    )
    parser.add_argument(
        "--tokenizer-of",
        metavar="DELTA",
        type=Path,
        help="whose chat template and end tokens to take where they disagree",
    )
    parser.add_argument(
        "--dense-dtype",
        choices=["fp32", "fp16", "bf16"],
        help="of matrices that are stored dense (default: fp32 for ta, fp16 for ties; served, bf16 takes half of fp16's memory)",
    )
    parser.add_argument(
        "--rows-dtype",
        choices=["fp32", "fp16", "int8"],
        help="of changed vocabulary rows (default: fp32 for ta, fp16 for ties; with --compress the method's)",
    )
    parser.add_argument(
        "--mask",
        choices=["auto", "seeded", "bitmask", "gap8"],
        help="of ta: how masks are written out (default: auto, in fewer bytes); of --compress: as in `compress`",
    )
    anew = parser.add_argument_group(
        "compress the merged projections anew (settings: `deltaworks delta compress --help`)"
    )
    anew.add_argument("--compress", choices=["impart", "impart-qt", "lowrank", "dare", "bitdelta"])
    size = anew.add_mutually_exclusive_group()
    size.add_argument("--ratio", type=float)
    size.add_argument("--bytes-ratio", type=float)
    anew.add_argument("--beta", type=float)
    anew.add_argument("--c", type=float)
    anew.add_argument("--value-dtype", choices=["fp16", "bf16", "int8", "int4"])
    anew.add_argument("--rule", choices=["exact", "released"])
    anew.add_argument("--accounting", choices=["exact", "released"])
    anew.add_argument("--rescale", choices=["exact", "released"])
    anew.add_argument("--seed", type=int)
    anew.add_argument("--per-row", action="store_true", default=None)
    parser.set_defaults(run=reporting(_merge))


def _merge(args: argparse.Namespace) -> int:
    from compressors.artifact import Artifact
    from compressors.base import resolve_base
    from compressors.inspect import summary, text
    from compressors.merge import MergeConfig, merge

    own = {"method": args.method, "weights": _numbers(args.weights), "retain": args.retain}
    given = {name: getattr(args, name) for name in ("scale", "dense_dtype") if getattr(args, name) is not None}
    anew = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    if args.compress is None:
        rows_dtype, mask = anew.pop("rows_dtype", None), anew.pop("mask", "auto")
        if anew:
            flag = next(iter(anew)).replace("_", "-")
            raise BudgetError(f"--{flag} is a setting of --compress METHOD; add it, or drop --{flag}")
        config = MergeConfig(**own, **given, rows_dtype=rows_dtype, mask=mask)
    else:
        config = MergeConfig(**own, **given, recompress=configured(args.compress, anew))
    merge(args.files, resolve_base(args.base), args.out, config, args.tokenizer_of, progress=True)
    with Artifact.open(args.out) as artifact:
        print(text(summary(artifact)))
    return 0


def _numbers(text: str | None) -> tuple[Any, ...]:
    """Raises BudgetError."""
    try:
        return tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError:
        raise BudgetError(
            f"--weights {text!r}: expected numbers between commas, one a delta, such as 0.5,0.5"
        ) from None
