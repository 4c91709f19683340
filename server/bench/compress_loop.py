"""`deltaworks bench compress-loop`: how fast ImPart compresses, against the straightforward way in the same run.

The rival is `compressors/svd_loop.py`. It keeps fp32 values, so it has the better of the comparison of losses.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from server.bench.report import Measurement, Used, reported, used_by

_LENGTH = 128  # tokens of a judged sequence


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write JSON where asked."""
    return reported(args.json, lambda: _measured(args))


def _measured(args: argparse.Namespace) -> list[Measurement]:
    from compressors.base import resolve_base
    from compressors.calibration import Calibration
    from compressors.divergence import Divergence

    base = resolve_base(args.base)
    judge = Divergence(base, args.fine_tune, Calibration(args.held_out, args.sequences, _LENGTH))
    settings = {"--ratio": f"{args.ratio:g}", "--beta": f"{args.beta:g}", "--c": f"{args.c:g}"}
    folders = [str(base), str(args.fine_tune)]
    with tempfile.TemporaryDirectory(prefix="deltaworks-bench-") as name:
        delta, merged = Path(name) / "delta.safetensors", Path(name) / "merged"
        flags = [word for pair in settings.items() for word in pair]
        commands = {
            "ours": ["-m", "server.cli", "delta", "compress", *folders, "-o", str(delta), *flags],
            "loop": ["-m", "compressors.svd_loop", *folders, str(merged), *settings.values()],
        }
        taken: dict[str, list[Used]] = {label: [] for label in commands}
        for _ in range(args.repeats):
            for label, words in commands.items():
                taken[label].append(used_by(words))
        loss, loop_loss = judge.of(delta).loss, judge.of_model(merged).loss
    ours, loop = (_least(taken[label]) for label in commands)
    rival = "SVD loop"
    return [
        Measurement("SVD loop, time", loop.seconds, "s"),
        Measurement("delta compress, time", ours.seconds, "s", loop.seconds / ours.seconds, f"{rival} / ours"),
        Measurement("delta compress, CPU time", ours.cpu_s, "s", loop.cpu_s / ours.cpu_s, f"{rival} / ours"),
        Measurement("delta compress, peak memory", ours.peak_mib, "MiB", ours.peak_mib / loop.peak_mib, rival),
        Measurement("delta compress, loss", loss, "nats", loss / loop_loss, rival),
    ]


def _least(runs: list[Used]) -> Used:
    return Used(*(min(getattr(one, name) for one in runs) for name in ("seconds", "cpu_s", "peak_mib")))
