"""`deltaworks steer sae check | convert | pack`."""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steering.errors import SteeringError
from steering.options import reporting

if TYPE_CHECKING:
    import torch

    from steering.sae import SAE

_EXAMPLES = """examples:
  deltaworks steer sae check runs/sae/layer-13 --model /models/smollm2
  deltaworks steer sae convert Llama3_1-8B-Base-L15R-8x --kind llama-scope --out sae-l15
  deltaworks steer sae pack runs/sae/layer-13 -o smollm2-l13.safetensors

SAE is a SAELens or sparsify folder, a params.npz of Gemma Scope, or a file that `pack` wrote."""
# The names of steering.convert.KINDS, which loads torch.
_KINDS = ("llama-scope", "dictionary-learning", "qwen-scope", "goodfire")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_WINDOW = 256  # tokens run at a time; the first of each, which draws huge activations, is left out


def add_parser(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sae = actions.add_parser(
        "sae",
        help="check, convert or pack a sparse autoencoder",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = sae.add_subparsers(dest="part", required=True, metavar="PART")
    check = parts.add_parser("check", help="read an SAE and, with a model, measure whether it reconstructs the stream")
    check.add_argument("sae", metavar="SAE", type=Path)
    check.add_argument("--model", metavar="FOLDER", type=Path, help="model folder; without it only the file is checked")
    check.add_argument("--text", metavar="FILE", type=Path, help="text to run (default: a built-in one)")
    check.add_argument("--tokens", type=_positive, default=768, help="at most so many (default: %(default)s)")
    check.add_argument("--threads", type=_positive, help="CPU threads (default: torch's own choice)")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(run=reporting(_check))
    convert = parts.add_parser("convert", help="turn a format that is read offline only into a SAELens folder")
    convert.add_argument("path", metavar="PATH", type=Path, help="folder, or .pt / .pth file")
    convert.add_argument("--kind", choices=_KINDS, required=True)
    convert.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="folder to create")
    convert.add_argument("--layer", type=int, help="decoder layer from 0, where the files do not tell it")
    convert.add_argument("--k", type=_positive, help="latents kept per row, where a TopK file does not tell it")
    convert.add_argument("--model-name", default="", help="of the model that it was trained on")
    convert.set_defaults(run=reporting(_convert))
    pack = parts.add_parser("pack", help="write an SAE as the one file that a server takes")
    pack.add_argument("sae", metavar="SAE", type=Path)
    pack.add_argument("-o", "--out", metavar="FILE", type=Path, required=True)
    pack.add_argument("--dtype", choices=_DTYPES, default="fp32", help="of the two matrices (default: %(default)s)")
    pack.set_defaults(run=reporting(_pack))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _check(args: argparse.Namespace) -> int:
    from steering.formats import load_sae
    from steering.sae import check_sae

    sae = load_sae(args.sae)
    found = _described(sae)
    if args.model is not None:
        rows = _streams(sae, args)
        measured = check_sae(sae, rows)
        found |= {
            "tokens": len(rows),
            "fvu": round(measured.fvu, 4),
            "l0": round(measured.l0, 2),
            "dead_share": round(measured.dead_share, 4),
            "verdict": measured.verdict,
        }
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(f"{name:14} {'-' if value is None else value}" for name, value in found.items()))
    if found.get("verdict") == "warn":
        print("warning: more than half of the variance is lost; an edit through this SAE may do little that is meant")
    return 0


def _described(sae: SAE) -> dict[str, Any]:
    return {
        "architecture": sae.architecture,
        "layer": sae.hook.layer,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "normalize": sae.normalize,
        "subtract_b_dec": sae.subtract_b_dec,
        "model_name": sae.model_name or None,
        "maxima": sae.maxima is not None,
    }


def _streams(sae: SAE, args: argparse.Namespace) -> torch.Tensor:
    """The model's stream at the SAE's layer over the text [N, d]. Raises SteeringError for a text that is too short."""
    import torch

    from steering.activations import load_model, load_tokenizer, read_streams

    text = (
        args.text.read_text(encoding="utf-8") if args.text else files("steering").joinpath("data/check.txt").read_text()
    )
    ids = load_tokenizer(args.model)(text)["input_ids"][: args.tokens]
    windows = [ids[start : start + _WINDOW] for start in range(0, len(ids), _WINDOW)]
    windows = [window for window in windows if len(window) > 1]
    if sum(map(len, windows)) < 32:
        raise SteeringError(f"the text has {len(ids)} tokens; at least 32 are needed to judge an SAE")
    model, layer = load_model(args.model, args.threads), sae.hook.layer
    return torch.cat([read_streams(model, torch.tensor(window), [layer])[layer][1:] for window in windows])


def _convert(args: argparse.Namespace) -> int:
    from steering.convert import convert

    sae = convert(args.path, args.kind, args.out, args.layer, args.model_name, args.k)
    print(f"wrote {args.out}: {sae.architecture}, layer {sae.hook.layer}, {sae.d_in} x {sae.d_sae}")
    print(f"see that it fits: deltaworks steer sae check {args.out} --model FOLDER")
    return 0


def _pack(args: argparse.Namespace) -> int:
    import torch

    from steering.formats import load_sae, pack_sae

    pack_sae(load_sae(args.sae), args.out, getattr(torch, _DTYPES[args.dtype]))
    print(f"wrote {args.out}  {args.out.stat().st_size:,} bytes")
    return 0
