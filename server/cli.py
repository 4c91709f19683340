"""The command `deltaworks`. The gateway's own commands are here; the other houses join through entry points."""

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from server.config import Settings, SettingsError, load_auth, load_settings

if TYPE_CHECKING:
    Subparsers: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]

AddParser: TypeAlias = Callable[["Subparsers"], None]
Flags: TypeAlias = dict[str, dict[str, Any]]  # section -> key -> value

GROUP = "deltaworks.commands"

# flag, settings section, key, type, help
SERVE_FLAGS: tuple[tuple[str, str, str, Callable[[str], Any], str], ...] = (
    ("--host", "server", "host", str, "address to listen on"),
    ("--port", "server", "port", int, "port to listen on; 0 picks a free one"),
    ("--admin-port", "server", "admin_port", int, "port of the admin plane alone (default: on --port)"),
    ("--served-name", "server", "served_name", str, "id of the base in the API (default: the folder's name)"),
    ("--store", "store", "path", str, "folder of the artifact store, or s3://BUCKET/PREFIX"),
    ("--api-key-file", "auth", "api_key_file", Path, "file of keys that may infer, one a line (default: open)"),
    ("--admin-key-file", "auth", "admin_key_file", Path, "file of keys that may administer (default: admin closed)"),
    (
        "--key-file",
        "auth",
        "key_file",
        Path,
        "TOML file of named keys with scopes, deltas and limits (deltaworks keys)",
    ),
    ("--dtype", "engine", "dtype", str, "auto, bfloat16 or float32"),
    ("--max-model-len", "engine", "max_model_len", int, "tokens of prompt and completion together"),
    (
        "--kv-cache-bytes",
        "engine",
        "kv_cache_bytes",
        int,
        "size of the KV cache (default on CPUs: a quarter of the free memory, at most 4 GiB)",
    ),
)

# flag, type, help; the fields of server/ray/deployment.py's Scale
RAY_FLAGS: tuple[tuple[str, Callable[[str], Any], str], ...] = (
    ("--replicas", int, "gateways, each with an engine of its own (default: 1)"),
    ("--cpus", float, "cores that Ray sets aside for each (default: 1)"),
    ("--gpus", float, "GPUs that each gets (default: 0)"),
    ("--max-ongoing", int, "requests that one takes before the next is asked (default: twice engine.max_num_seqs)"),
    ("--replica-port", int, "where the first listens itself; the others on the ports after it"),
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="deltaworks", description="Serve many fine-tunes of one base model.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    joined = {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}
    # A known command loads its own house only: serving does not wait for, or fail with, the trainers' imports.
    named = {*OWN, *joined}.intersection(arguments[:1]) or {*OWN, *joined}
    for name in sorted(named):
        add_parser: AddParser = OWN[name] if name in OWN else joined[name].load()
        add_parser(subparsers)
    args = parser.parse_args(arguments)
    status: int = args.run(args)
    return status


def add_serve(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser("serve", help="serve a base model and its deltas over the OpenAI API")
    _add_settings(parser)
    parser.set_defaults(run=run_serve)


def add_ray(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser("ray", help="serve with several engines on this machine, behind Ray Serve")
    _add_settings(parser)
    for flag, kind, text in RAY_FLAGS:
        parser.add_argument(flag, type=kind, help=text)
    parser.set_defaults(run=run_ray)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="default", help="model folder (default: the embedded base)")
    parser.add_argument("--config", type=Path, help="TOML file of settings; flags and DELTAWORKS__* come before it")
    parser.add_argument("--print-config", action="store_true", help="print the settings in force and stop")
    for flag, _, _, kind, text in SERVE_FLAGS:
        parser.add_argument(flag, type=kind, help=text)


def add_bench(subparsers: "Subparsers") -> None:
    from server.bench.cli import add_parser

    add_parser(subparsers)


def add_keys(subparsers: "Subparsers") -> None:
    from server.keys_cli import add_parser

    add_parser(subparsers)


def run_serve(args: argparse.Namespace) -> int:
    return _with_settings(args, _serve)


def run_ray(args: argparse.Namespace) -> int:
    return _with_settings(args, _serve_on_ray)


def _serve(args: argparse.Namespace, settings: Settings, flags: Flags) -> int:
    from server.serve import serve

    return serve(args.model, settings, partial(load_auth, args.config, flags))


def _serve_on_ray(args: argparse.Namespace, settings: Settings, flags: Flags) -> int:
    from server.ray.start import serve_on_ray

    given = {_destination(flag): getattr(args, _destination(flag)) for flag, _, _ in RAY_FLAGS}
    scale = {key: value for key, value in given.items() if value is not None}
    return serve_on_ray(args.model, settings, scale, args.config, flags)


def _with_settings(args: argparse.Namespace, run: Callable[[argparse.Namespace, Settings, Flags], int]) -> int:
    """`run` with the settings in force; or says what is wrong with them, or prints them."""
    flags: Flags = {}
    for flag, section, key, _, _ in SERVE_FLAGS:
        value = getattr(args, _destination(flag))
        if value is not None:
            flags.setdefault(section, {})[key] = value
    try:
        settings = load_settings(args.config, os.environ, flags)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.print_config:
        print(settings.to_toml(), end="")
        return 0
    return run(args, settings, flags)


def _destination(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def add_demo(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "demo", help="start a server with demo deltas and ask all of them the same questions"
    )
    parser.add_argument(
        "--deltas", type=Path, default=Path("deploy/demo"), help="folder with demo.json (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port of the server (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="stop after the answers instead of serving on")
    parser.set_defaults(run=run_demo)


def run_demo(args: argparse.Namespace) -> int:
    from server.demo import demo

    return demo(args.deltas, args.port, args.once)


def add_openapi(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser("openapi", help="print the OpenAPI document of the whole HTTP API")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write it there instead")
    parser.set_defaults(run=run_openapi)


def run_openapi(args: argparse.Namespace) -> int:
    from server.app import ROUTES
    from server.routes.openapi import rendered

    document = rendered(ROUTES).decode()
    if args.output is None:
        print(document)
        return 0
    try:
        args.output.write_text(document + "\n", encoding="utf-8")
    except OSError as error:
        print(f"error: cannot write {args.output}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


OWN: dict[str, AddParser] = {
    "bench": add_bench,
    "demo": add_demo,
    "keys": add_keys,
    "openapi": add_openapi,
    "ray": add_ray,
    "serve": add_serve,
}

if __name__ == "__main__":
    sys.exit(main())
