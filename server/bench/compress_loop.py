"""`deltaworks bench compress-loop`: how fast ImPart compresses, against the straightforward way in the same run.

The rival is the method as one would first write it down: both checkpoints in memory, one matrix after the other, torch's SVD, the
boundary shift that takes the mean anew for every column, a random permutation for each column of each factor, and the dense
product. It keeps fp32 values, so it has the better of the comparison of losses.
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
        rival = [["-m", __name__, str(base), str(args.fine_tune), str(merged), *settings]]
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


def main(base: str, fine_tune: str, out: str, ratio: str, beta: str, c: str) -> int:
    """The rival: `out` becomes the model folder of base + compressed delta."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    from compressors.impart import sparsity_of
    from compressors.layout import is_projection

    torch.manual_seed(0)
    old, new = (load_file(Path(folder) / "model.safetensors") for folder in (base, fine_tune))
    merged = {}
    for name, weight in new.items():
        if not is_projection(name, weight.dim()):
            merged[name] = weight.float()
            continue
        u, s, vt = torch.linalg.svd(weight.float() - old[name].float(), full_matrices=False)
        sparsity, pruned = sparsity_of((len(u), vt.shape[1]), float(ratio), float(beta), "exact")
        drops = _drops(s.tolist(), sparsity, pruned, float(c))
        for k, drop in enumerate(drops):
            for column in (u[:, k], vt[k]):
                column[torch.randperm(len(column))[: int(len(column) * drop)]] = 0
                column /= 1 - drop
        rank = len(drops)
        merged[name] = old[name].float() + (u[:, :rank] * s[:rank]) @ vt[:rank]
    Path(out).mkdir(exist_ok=True)
    for file in Path(fine_tune).glob("*.json"):
        shutil.copy(file, out)
    save_file(merged, Path(out) / "model.safetensors")
    return 0


def _drops(sigma: Sequence[float], sparsity: float, pruned: float, c: float) -> list[float]:
    """The paper's allocator (algorithm 2), the boundary shifted a column at a time."""
    count = max(1, int(len(sigma) * (1 - pruned)))
    gamma = (sparsity - pruned) / (1 - pruned)
    drops = [(1 - value**c / sigma[0] ** c) * gamma for value in sigma[:count]]
    last = count
    while sum(drops) / count < gamma and last > 1:
        last -= 1
        drops[last] = 1.0
    return drops[:last]


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
