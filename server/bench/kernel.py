"""`deltaworks bench kernel`: one tensor's delta in every form, by rows and density, against the base's product in the same run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from server.bench.report import Measurement, command, machine, write_json

if TYPE_CHECKING:
    from compressors.kernels.measure import Cell


def run(args: argparse.Namespace) -> int:
    """Measure, print one table for each number of rows, write JSON where asked."""
    from tqdm import tqdm

    from compressors.kernels.build import KernelUnavailableError
    from compressors.kernels.measure import table
    from compressors.kernels.native import LEVELS, NativeKernel

    facts = machine()
    try:
        kernel = NativeKernel.load()
    except KernelUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    level = kernel.level if args.level is None else LEVELS.index(args.level)
    if level > kernel.level:
        print(f"error: this CPU has no {args.level}, only {', '.join(LEVELS[: kernel.level + 1])}", file=sys.stderr)
        return 1
    share = 2 / args.ratio  # of the weight's numbers: an int8 value takes half the bytes of a bf16 one
    shape = (args.out_features, args.in_features)
    with tqdm(total=len(args.density) * len(args.rows), desc="measuring", unit="cell") as bar:
        cells = table(kernel, level, shape, share, args.density, args.rows, bar.update)
    facts["kernel"] = f"{LEVELS[level]}, weight {shape[0]} x {shape[1]}, {share:.4f} of its numbers as int8, one thread"
    for key, value in facts.items():
        print(f"{key:>11}  {value}")
    print(f"{'command':>11}  {command()}")
    print_tables(cells)
    if args.json:
        write_json(args.json, facts, measurements(cells))
    return 0


def print_tables(cells: Sequence[Cell]) -> None:
    """Microseconds of the base's product, and each form's time as a share of it; the fastest form is starred."""
    from compressors.kernels.measure import BASE, CHOSEN

    forms = list(dict.fromkeys(cell.form for cell in cells if cell.form != BASE))
    times = {(cell.rows, cell.density, cell.form): cell.microseconds for cell in cells}
    for rows in dict.fromkeys(cell.rows for cell in cells):
        print(f"\nrows of one delta: {rows}")
        print(f"{'density':>8} {BASE + ', us':>14}  " + " ".join(f"{form:>14}" for form in forms))
        for density in dict.fromkeys(cell.density for cell in cells):
            base = times[rows, density, BASE]
            best = min((form for form in forms if form != CHOSEN), key=lambda form: times[rows, density, form])
            shares = (f"{times[rows, density, form] / base:.3f}{'*' if form == best else ' '}" for form in forms)
            print(f"{density:>8.2f} {base:>14.1f}  " + " ".join(f"{share:>14}" for share in shares))


def measurements(cells: Sequence[Cell]) -> list[Measurement]:
    """The cells as rows of a report; the ratio is to the base's product of the same rows."""
    from compressors.kernels.measure import BASE

    base = {(cell.rows, cell.density): cell.microseconds for cell in cells if cell.form == BASE}
    found = []
    for cell in cells:
        name = f"{cell.rows} rows, density {cell.density:g}, {cell.form}"
        ratio = None if cell.form == BASE else cell.microseconds / base[cell.rows, cell.density]
        found.append(Measurement(name, cell.microseconds, "us", ratio, None if ratio is None else BASE))
    return found
