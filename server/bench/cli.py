"""`deltaworks bench …`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib import import_module
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Join `bench` to the command line."""
    bench = subparsers.add_parser("bench", help="measure, as ratios against a rival in the same run")
    actions = bench.add_subparsers(dest="action", required=True, metavar="ACTION")
    serve = _bench(actions, "serve", "cost of deltas in the engine, against bare vLLM and its own LoRA")
    serve.add_argument("--cold-repeats", type=int, default=5, help="deltas loaded cold (default: %(default)s)")
    steer = _bench(actions, "steer", "cost of edits in the engine, and what they leave of the prefix cache")
    steer.add_argument(
        "--profile",
        type=Path,
        default=Path("deploy/demo/steering/knowledge.safetensors"),
        help="profile of the base (default: %(default)s)",
    )
    steer.add_argument("--direction", default="use_context", help="(default: %(default)s)")
    steer.add_argument("--strength", type=float, default=2.0, help="(default: %(default)g)")
    _add_gateway(actions)
    _add_soak(actions)
    _add_kernel(actions)
    _add_gate(actions)
    _add_compress(actions)
    _add_compress_loop(actions)
    parsers = actions.add_parser("parsers", help="tool-call parsers on the cases of the Berkeley leaderboard")
    parsers.add_argument("--bfcl", type=Path, required=True, help="folder bfcl_eval/data of the unpacked bfcl-eval")
    parsers.add_argument("--url", help="of a gateway with its /v1: also ask what no tool fits, and what one does")
    parsers.add_argument("--model", default="default", help="there (default: %(default)s)")
    parsers.add_argument("--wait", type=int, default=300, metavar="S", help="for it to start (default: %(default)s)")
    parsers.add_argument("--limit", type=int, help="cases of a category (default: all)")
    parsers.add_argument("--json", type=Path, help="also write the rows to this file")
    for action, parser in actions.choices.items():
        parser.set_defaults(run=partial(_run, action.replace("-", "_")))


def _run(module: str, args: argparse.Namespace) -> int:
    """The bench of that module, imported only now. Ctrl-C and SIGTERM end it together with its servers and engines."""
    from server.child import interruptible

    try:
        with interruptible():
            status: int = import_module(f"server.bench.{module}").run(args)
            return status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _add_gateway(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    gateway = _bench(actions, "gateway", "our server against vLLM's own, over HTTP on the same engine and load")
    gateway.set_defaults(repeats=3)
    gateway.add_argument("--prompt-tokens", type=int, default=64, help="of each request (default: %(default)s)")
    gateway.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="closed loops (default: 1 8 32)")
    gateway.add_argument(
        "--requests", type=int, default=8, help="of a closed loop, two a client at least (default: %(default)s)"
    )
    gateway.add_argument("--rate", type=float, help="of the Poisson load (default: 0.7 of what a closed loop reaches)")
    gateway.add_argument("--max-num-seqs", type=int, default=32, help="of each engine (default: %(default)s)")
    gateway.add_argument(
        "--zipf", action=argparse.BooleanOptionalAction, default=True, help="also 64 deltas over 8 places"
    )


def _add_soak(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    soak = _engines(
        actions, "soak", "what a gateway holds, gives back and survives: streams, loads, leavers, a mixed load"
    )
    soak.set_defaults(dtype="auto")
    soak.add_argument("--max-num-seqs", type=int, default=16, help="of the engine (default: %(default)s)")
    soak.add_argument("--streams", type=int, default=1000, help="held open at once (default: %(default)s)")
    soak.add_argument("--cycles", type=int, default=200, help="of loading and unloading (default: %(default)s)")
    soak.add_argument("--clients", type=int, default=16, help="that ask at once (default: %(default)s)")
    soak.add_argument("--minutes", type=float, default=10.0, help="of the mixed load (default: %(default)g)")


def _add_kernel(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    kernel = actions.add_parser(
        "kernel", help="one tensor's delta in every form, by rows and density, against the base"
    )
    kernel.add_argument("--out-features", type=int, default=1536, help="of the weight (default: %(default)s)")
    kernel.add_argument("--in-features", type=int, default=576, help="of the weight (default: %(default)s)")
    kernel.add_argument("--ratio", type=float, default=32.0, help="bf16 weight to int8 values (default: %(default)g)")
    kernel.add_argument(
        "--density", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5, 1.0], help="of columns (default: .1 to 1)"
    )
    kernel.add_argument(
        "--rows", type=int, nargs="+", default=[1, 4, 8, 16, 64, 512], help="of one delta (default: 1 to 512)"
    )
    kernel.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: Triton against the base and LoRA (default: %(default)s)",
    )
    kernel.add_argument("--deltas", type=int, help="with --device cuda: how many at once (default: 8)")
    kernel.add_argument("--level", choices=("portable", "avx2", "avx512"), help="(default: the best of this CPU)")
    kernel.add_argument("--json", type=Path, help="also write the rows to this file")


def _add_gate(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    gate = actions.add_parser(
        "gate", help="what a tool gate saves, spoils and costs, against the same gateway without it"
    )
    gate.add_argument("--delta", type=Path, required=True, help="the delta that the policy is bound to")
    gate.add_argument("--policy", type=Path, required=True, help="written by `deltaworks gate fit`")
    gate.add_argument("--profile", type=Path, help="whose probe the policy reads, where it has the stage hidden")
    gate.add_argument("--tasks", type=Path, required=True, help="questions that the policy was not fitted on (.jsonl)")
    gate.add_argument("--facts", type=Path, help="JSON object of texts, for the executor `lookup`")
    gate.add_argument("--limit", type=int, help="only so many of the tasks (default: all)")
    gate.add_argument("--concurrency", type=int, default=1, help="questions at once (default: %(default)s)")
    gate.add_argument("--max-tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    gate.add_argument(
        "--plain",
        type=int,
        default=60,
        help="questions without tools at either gateway; 0: none (default: %(default)s)",
    )
    gate.add_argument("--base", default="default", help="model folder, or `default` (default: %(default)s)")
    gate.add_argument("--dtype", default="auto", help="as it was labelled with (default: %(default)s)")
    gate.add_argument("--threads", type=int, default=1, help="of the engine (default: %(default)s)")
    gate.add_argument("--log", type=Path, help="also write every question's run to this file (.jsonl)")
    gate.add_argument("--json", type=Path, help="also write the rows to this file")


def _add_compress(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compress = actions.add_parser("compress", help="what each method keeps of a fine-tune at equal bytes")
    compress.add_argument("--base", default="default", help="model folder, or `default` (default: %(default)s)")
    compress.add_argument("--fine-tune", type=Path, required=True, help="model folder of the full fine-tune")
    compress.add_argument(
        "--held-out", type=Path, required=True, help="rows {prompt, completion} that it was not trained on (.jsonl)"
    )
    compress.add_argument(
        "--bytes-ratios", type=_numbers, default=[8.0, 16.0, 32.0, 64.0], help="(default: 8,16,32,64)"
    )
    compress.add_argument("--seeds", type=int, default=3, help="of the masks (default: %(default)s)")
    compress.add_argument(
        "--sequences", type=int, default=16, help="of 128 tokens, in each half (default: %(default)s)"
    )
    compress.add_argument("--max-tokens", type=int, default=32, help="of an answer (default: %(default)s)")
    compress.add_argument(
        "--distil-steps",
        type=int,
        default=0,
        help="also BitDelta with its scales distilled on the choosing half, in so many steps (default: %(default)s, without)",
    )
    compress.add_argument("--json", type=Path, help="also write the rows to this file, as they are measured")
    compress.add_argument("--plot", type=Path, help="also draw KL over the byte ratio (.png)")


def _add_compress_loop(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    loop = actions.add_parser(
        "compress-loop", help="time of ImPart's compression against a plain loop over torch's SVD"
    )
    loop.add_argument("--base", default="default", help="model folder, or `default` (default: %(default)s)")
    loop.add_argument("--fine-tune", type=Path, required=True, help="model folder of the full fine-tune")
    loop.add_argument("--held-out", type=Path, required=True, help="rows {prompt, completion} for the loss (.jsonl)")
    loop.add_argument("--ratio", type=float, default=32.0, help="by surviving values (default: %(default)g)")
    loop.add_argument("--beta", type=float, default=0.6, help="(default: %(default)g)")
    loop.add_argument("--c", type=float, default=1.0, help="(default: %(default)g)")
    loop.add_argument("--sequences", type=int, default=16, help="of 128 tokens (default: %(default)s)")
    loop.add_argument("--repeats", type=int, default=2, help="of each; the best counts (default: %(default)s)")
    loop.add_argument("--json", type=Path, help="also write the rows to this file")


def _numbers(text: str) -> list[float]:
    return [float(one) for one in text.split(",")]


def _bench(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, purpose: str
) -> argparse.ArgumentParser:
    """A bench in rounds, with the options that all of these take."""
    bench = _engines(actions, name, purpose)
    bench.add_argument("--tokens", type=int, default=32, help="tokens per row (default: %(default)s)")
    bench.add_argument("--repeats", type=int, default=5, help="rounds, after one of warm-up (default: %(default)s)")
    return bench


def _engines(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, purpose: str
) -> argparse.ArgumentParser:
    """A bench that starts engines, and serves deltas."""
    bench = actions.add_parser(name, help=purpose)
    bench.add_argument("--base", default="default", help="model folder, or `default` (default: %(default)s)")
    bench.add_argument(
        "--deltas", type=Path, default=Path("deploy/demo"), help="folder of deltas of the base (default: %(default)s)"
    )
    bench.add_argument("--dtype", default="bfloat16", help="bfloat16, float32 or auto (default: %(default)s)")
    bench.add_argument("--threads", type=int, default=1, help="threads of each engine (default: %(default)s)")
    bench.add_argument("--json", type=Path, help="also write the rows to this file")
    return bench
