"""`deltaworks keys`: make a key, or the hash of one that exists, for a key file."""

import argparse
import json
import secrets
import sys
from typing import TYPE_CHECKING, TypeAlias

from pydantic import ValidationError

from server.config import KeySettings
from server.keys import hash_key

if TYPE_CHECKING:
    Subparsers: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]

_KEY_BYTES = 32


def add_parser(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser("keys", help="make API keys; a server keeps their hashes only")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    new = commands.add_parser(
        "new", help="make a key: itself on standard error, once; its entry of a key file on standard output"
    )
    new.add_argument("id", help="what the log calls it")
    new.add_argument(
        "--scope",
        action="append",
        choices=["inference", "admin"],
        help="what it may do (default: inference; may repeat)",
    )
    new.add_argument(
        "--delta", action="append", metavar="NAME", help="a delta that it may use, or a pattern with * (default: all)"
    )
    new.add_argument("--max-concurrent", type=int, help="rows in flight")
    new.add_argument("--max-queued-tokens", type=int, help="prompt tokens that wait for their first output token")
    new.add_argument("--requests-per-minute", type=int)
    new.set_defaults(run=run_new)
    hashed = commands.add_parser("hash", help="the hash of a key that is read from standard input")
    hashed.set_defaults(run=run_hash)


def run_new(args: argparse.Namespace) -> int:
    key = f"dw-{secrets.token_urlsafe(_KEY_BYTES)}"
    entry = {
        "id": args.id,
        "hash": hash_key(key),
        "scopes": sorted(set(args.scope or ["inference"])),
        "deltas": args.delta,
        "max_concurrent": args.max_concurrent,
        "max_queued_tokens": args.max_queued_tokens,
        "requests_per_minute": args.requests_per_minute,
    }
    given = {name: value for name, value in entry.items() if value is not None}
    try:
        KeySettings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        print(f"error: {'.'.join(map(str, first['loc']))}: {first['msg']}", file=sys.stderr)
        return 1
    print("[[keys]]")
    for name, value in given.items():
        print(f"{name} = {json.dumps(value)}")
    print(f"key: {key}", file=sys.stderr)
    return 0


def run_hash(args: argparse.Namespace) -> int:
    key = sys.stdin.readline().strip()
    if not key:
        print("error: no key on standard input", file=sys.stderr)
        return 1
    print(hash_key(key))
    return 0
