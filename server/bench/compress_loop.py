"""`deltaworks bench compress-loop`: how fast ImPart compresses, against the straightforward way in the same run.

The rival is `compressors/svd_loop.py`. It keeps fp32 values, so it has the better of the comparison of losses.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from compressors.errors import DeltaError
from server.bench.report import Measurement, machine, print_report, write_json

_LENGTH = 128  # tokens of a judged sequence


def run(args: argparse.Namespace) -> int:
    try:
        return _run(args)
    except (DeltaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    from compressors.base import resolve_base
    from compressors.calibration import Calibration
    from compressors.divergence import Divergence

    facts, base = machine(), resolve_base(args.base)
    judge = Divergence(base, args.fine_tune, Calibration(args.held_out, args.sequences, _LENGTH))
    settings = [f"{args.ratio:g}", f"{args.beta:g}", f"{args.c:g}"]
    with tempfile.TemporaryDirectory(prefix="deltaworks-bench-") as name:
        delta, merged = Path(name) / "delta.safetensors", Path(name) / "merged"
        flags = [word for pair in zip(("--ratio", "--beta", "--c"), settings, strict=True) for word in pair]
        ours = [["-m", "server.cli", "delta", "compress", str(base), str(args.fine_tune), "-o", str(delta), *flags]]
        rival = [["-m", "compressors.svd_loop", str(base), str(args.fine_tune), str(merged), *settings]]
        times: dict[str, list[tuple[float, float, float]]] = {"ours": [], "loop": []}
        for _ in range(args.repeats):
            for label, (words,) in (("ours", ours), ("loop", rival)):
                times[label].append(_child(words))
        loss, loop_loss = judge.of(delta).loss, judge.of_model(merged).loss
    (wall, cpu, peak), (loop_wall, loop_cpu, loop_peak) = (tuple(map(min, zip(*times[k], strict=True))) for k in times)
    loop = "SVD loop"
    rows = [
        Measurement("SVD loop, time", loop_wall, "s"),
        Measurement("delta compress, time", wall, "s", loop_wall / wall, f"{loop} / ours"),
        Measurement("delta compress, CPU time", cpu, "s", loop_cpu / cpu, f"{loop} / ours"),
        Measurement("delta compress, peak memory", peak, "MiB", peak / loop_peak, loop),
        Measurement("delta compress, loss", loss, "nats", loss / loop_loss, loop),
    ]
    print_report(facts, rows)
    if args.json is not None:
        write_json(args.json, facts, rows)
    return 0


def _child(words: Sequence[str]) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak resident MiB of a Python process of its own, its start included."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise DeltaError(f"a process of the bench ended with {child.returncode}: {' '.join(words)}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
