"""`deltaworks delta compress | import | merge | inspect | verify | decompress`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from compressors import compress_cli, merge_cli
from compressors.errors import DeltaError

_EXAMPLES = """examples:
  deltaworks delta compress default runs/json/model -o json.safetensors
  deltaworks delta compress /models/llama-3-8b /models/my-tune -o tune.safetensors --bytes-ratio 32 --value-dtype int4
  deltaworks delta import my-lora/ -o lora.safetensors --base default
  deltaworks delta merge json.safetensors captain.safetensors -o both.safetensors --base default --weights 0.5,0.5
  deltaworks delta inspect json.safetensors
  deltaworks delta verify json.safetensors --base default
  deltaworks delta decompress json.safetensors --base default -o merged/

BASE is a local Hugging Face model folder, or the word `default` for the embedded SmolLM2-135M-Instruct."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Join `delta` to the command line."""
    delta = subparsers.add_parser(
        "delta",
        help="compress a fine-tune into a delta, merge deltas, and look at, check or undo one",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = delta.add_subparsers(dest="action", required=True, metavar="ACTION")
    compress_cli.add_parser(actions, _reporting)
    _add_import(actions)
    merge_cli.add_parser(actions, _reporting)
    inspect = actions.add_parser("inspect", help="print what a delta holds and its three compression ratios")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    inspect.set_defaults(run=_reporting(_inspect))
    check = actions.add_parser("verify", help="check a delta's structure, digests and values, and that it fits a base")
    check.add_argument("file", type=Path)
    check.add_argument("--base", help="model folder, or `default`: also check that the delta belongs to it")
    check.set_defaults(run=_reporting(_verify))
    undo = actions.add_parser("decompress", help="write base + delta as an ordinary model folder")
    undo.add_argument("file", type=Path)
    undo.add_argument("--base", required=True, help="model folder, or `default`")
    undo.add_argument("-o", "--out", type=Path, required=True, help="folder to create")
    undo.add_argument(
        "--dtype",
        choices=["fp32", "bf16", "fp16"],
        default="bf16",
        help="of the written weights (default: %(default)s)",
    )
    undo.set_defaults(run=_reporting(_decompress))


def _add_import(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    lora = actions.add_parser("import", help="turn a PEFT LoRA folder into a delta file, without loss")
    lora.add_argument(
        "folder", metavar="LORA_FOLDER", type=Path, help="with adapter_config.json and adapter_model.safetensors"
    )
    lora.add_argument("--base", required=True, help="model folder that the LoRA was trained on, or `default`")
    lora.add_argument("-o", "--out", type=Path, required=True, help="file to write (.safetensors)")
    lora.add_argument(
        "--rows-dtype",
        choices=["int8", "fp16"],
        default="fp16",
        help="of vocabulary tables in modules_to_save (default: %(default)s)",
    )
    lora.add_argument("--name", help="the base's name in the manifest, for people (default: the folder's)")
    lora.set_defaults(run=_reporting(_import))


def _reporting(action: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        try:
            return action(args)
        except (DeltaError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted; nothing was written", file=sys.stderr)
            return 130

    return run


def _import(args: argparse.Namespace) -> int:
    from compressors.artifact import Artifact
    from compressors.base import resolve_base
    from compressors.inspect import summary, text
    from compressors.peft import import_lora

    import_lora(args.folder, resolve_base(args.base), args.out, args.name, args.rows_dtype, progress=True)
    with Artifact.open(args.out) as artifact:
        print(text(summary(artifact)))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from compressors.artifact import Artifact
    from compressors.inspect import summary, text
    from compressors.verify import verify

    verify(args.file)
    with Artifact.open(args.file) as artifact:
        found = summary(artifact)
    print(json.dumps(found, indent=2) if args.json else text(found))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from compressors.base import resolve_base
    from compressors.fingerprint import fingerprint, stored_tensors
    from compressors.verify import verify

    if args.base is None:
        report = verify(args.file)
    else:
        base = resolve_base(args.base)
        shapes = {name: tensor.shape for name, tensor in stored_tensors(base).items()}
        report = verify(args.file, fingerprint(base), shapes, base)
    print(f"ok: {', '.join(report.checks)}\nsha256 {report.digest}  {report.nbytes:,} bytes")
    return 0


def _decompress(args: argparse.Namespace) -> int:
    from compressors.base import resolve_base
    from compressors.decompress import decompress

    decompress(args.file, resolve_base(args.base), args.out, args.dtype, progress=True)
    print(f"wrote {args.out}")
    return 0
