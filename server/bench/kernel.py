"""`deltaworks bench kernel`: one tensor's delta in every form, by rows and density, against the base's product in the same run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from server.bench.report import Measurement, command, machine, write_json

if TYPE_CHECKING:
    from compressors.kernels.measure import Cell

_DELTAS = 8  # at once, on a GPU


def run(args: argparse.Namespace) -> int:
    """Measure, print one table for each number of rows, write JSON where asked."""
    if args.device == "cuda":
        return _run_gpu(args)
    from tqdm import tqdm

    from compressors.kernels.build import KernelUnavailableError
    from compressors.kernels.measure import table
    from compressors.kernels.native import LEVELS, NativeKernel

    if args.deltas is not None:
        print("error: --deltas is for --device cuda; on a CPU one delta is measured", file=sys.stderr)
        return 1
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
    _report(args, facts, cells)
    return 0


def _run_gpu(args: argparse.Namespace) -> int:
    """The Triton kernels against the base's product and against vLLM's LoRA kernels with as many bytes."""
    from tqdm import tqdm

    from compressors.kernels.gpu import gpu_problem

    problem = "--level is for CPUs" if args.level is not None else gpu_problem()
    if problem is not None:
        print(f"error: --device cuda: {problem}", file=sys.stderr)
        return 1
    from compressors.kernels.measure_gpu import Setting, gpu, gpu_facts, layers_for, table
    from server.bench.punica import dense_lora

    facts = machine() | gpu_facts()
    shape = (args.out_features, args.in_features)
    setting = Setting(shape, 2 / args.ratio, args.deltas or _DELTAS, layers_for(shape))
    with tqdm(total=len(args.density) * len(args.rows), desc="measuring", unit="cell") as bar:
        cells = table(gpu(), setting, args.density, args.rows, dense_lora, bar.update)
    facts["kernel"] = (
        f"{setting.deltas} deltas at once, weight {shape[0]} x {shape[1]}, {setting.share:.4f} of its numbers as int8 each,"
        f" {setting.layers} layers in one CUDA graph; dense lora has as many bytes"
    )
    _report(args, facts, cells)
    return 0


def _report(args: argparse.Namespace, facts: dict[str, str], cells: Sequence[Cell]) -> None:
    for key, value in facts.items():
        print(f"{key:>11}  {value}")
    print(f"{'command':>11}  {command()}")
    print_tables(cells)
    if args.json:
        write_json(args.json, facts, measurements(cells))


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
