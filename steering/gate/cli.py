"""`deltaworks gate ...`: one module per subcommand, imported when `gate` is called and none of them heavy."""

from __future__ import annotations

import argparse
from importlib import import_module

# Each has add_parser(subparsers); listed in the order of their use.
MODULES = (
    "steering.gate.label_cli",
    "steering.gate.streams_cli",
    "steering.gate.fit_cli",
    "steering.gate.eval_cli",
    "steering.gate.report_cli",
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Join `gate` to the command line."""
    gate = subparsers.add_parser("gate", help="policies that decide per request whether tools are needed")
    actions = gate.add_subparsers(dest="action", required=True, metavar="ACTION")
    for module in MODULES:
        import_module(module).add_parser(actions)
