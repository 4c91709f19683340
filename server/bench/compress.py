"""`deltaworks bench compress`: what every method keeps of a fine-tune at equal bytes.

The held-out rows are halved. On the one half each method's best setting is chosen, by KL to the fine-tune; on the other it is
judged, over several seeds of its masks. So no method gains from being tried more often.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from compressors.artifact import Artifact
from compressors.errors import DeltaError
from server.bench.report import Used, command, ended, machine, used_by
from steering.gate.answers import right

if TYPE_CHECKING:
    from compressors.divergence import Divergence
    from compressors.methods import Config

_HALF = "half{}.jsonl"
_LENGTH = 128  # tokens of a judged sequence
_LABELS = ("beta", "c", "value_dtype", "per_row")


@dataclass(frozen=True)
class Question:
    """A row of the held-out file. `accepted`: the answer is right if it is equal to one of them (steering.gate.answers)."""

    prompt: str
    completion: str
    accepted: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """One method at one byte ratio. Lists are per seed; ratios, seconds and peak of the first seed."""

    bytes_ratio: float
    method: str
    settings: dict[str, Any]
    kl: list[float]
    loss: list[float]
    success: list[float]
    values: float | None
    projection_bytes: float | None
    whole_file: float | None
    seconds: float
    peak_mib: float


def run(args: argparse.Namespace) -> int:
    return ended(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from compressors.base import resolve_base
    from compressors.calibration import Calibration
    from compressors.divergence import Divergence

    facts, base = machine(), resolve_base(args.base)
    questions = read_questions(args.held_out)
    with tempfile.TemporaryDirectory(prefix="deltaworks-bench-") as name:
        folder = Path(name)
        halves = []
        for number, part in enumerate((questions[::2], questions[1::2])):
            file = folder / _HALF.format(number)
            file.write_text("".join(_chat(one) + "\n" for one in part), encoding="utf-8")
            halves.append(Divergence(base, args.fine_tune, Calibration(file, args.sequences, _LENGTH)))
        judge = _Judge(halves[1], questions[1::2], args.max_tokens)
        references = {"base": judge.of_model(base), "fine-tune": judge.of_model(args.fine_tune)}
        lines: list[Line] = []
        for ratio in args.bytes_ratios:
            for config in _best(base, args.fine_tune, ratio, halves[0], folder):
                for one in _with_distilled(config, args.distil_steps):
                    lines.append(_line(base, args.fine_tune, ratio, one, judge, args.seeds, folder))
                    _save(args.json, facts, references, lines)  # what is measured is never lost
    _print(facts, references, lines)
    if args.plot is not None:
        plot(lines, args.plot)


def read_questions(path: Path) -> list[Question]:
    """Rows {prompt, completion, expected?} without tools. Raises DeltaError naming the line."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            if row.get("tools") or row.get("messages"):
                continue
            accepted = (row["completion"], *([row["expected"]] if row.get("expected") else []))
            found.append(Question(row["prompt"], row["completion"], accepted))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise DeltaError(f"{path}, line {number}: expected an object with prompt and completion") from None
    if len(found) < 2:
        raise DeltaError(f"{path} has {len(found)} rows without tools; two are needed at least, to choose and to judge")
    return found


class _Judge:
    """KL, loss and success on the judging half."""

    def __init__(self, divergence: Divergence, questions: Sequence[Question], max_tokens: int) -> None:
        self._divergence = divergence
        self._questions = questions
        self._max_tokens = max_tokens

    def of(self, delta: Path) -> tuple[float, float, float]:
        found = self._divergence.of(delta)
        return found.kl, found.loss, self._success()

    def of_model(self, folder: Path) -> tuple[float, float, float]:
        found = self._divergence.of_model(folder)
        return found.kl, found.loss, self._success()

    def _success(self) -> float:
        texts = self._divergence.answers([one.prompt for one in self._questions], self._max_tokens)
        pairs = zip(texts, self._questions, strict=True)
        return sum(right(text, one.accepted) for text, one in pairs) / len(self._questions)


def _chat(question: Question) -> str:
    return json.dumps({"prompt": question.prompt, "completion": question.completion})


def _best(base: Path, fine_tune: Path, ratio: float, chooser: Divergence, folder: Path) -> list[Config]:
    """The best setting of each method that has one within the bytes."""
    from compressors.compress import compress_each
    from compressors.search import candidates, fits

    tried = candidates(ratio, 0, "int8")
    paths = [folder / f"candidate{number}" for number in range(len(tried))]
    compress_each(base, fine_tune, list(zip(tried, paths, strict=True)), progress=True)
    best: dict[str, tuple[float, Config]] = {}
    for config, path in zip(tried, tqdm(paths, f"choosing at {ratio:g}x", unit="candidate"), strict=True):
        if fits(path, ratio):
            kl = chooser.of(path).kl
            if config.method not in best or kl < best[config.method][0]:
                best[config.method] = (kl, config)
        path.unlink()
    return [config for _, config in best.values()]


def _with_distilled(config: Config, steps: int) -> list[Config]:
    """A method's best setting; of BitDelta also with its scales distilled on the choosing half."""
    if config.method != "bitdelta" or not steps:
        return [config]
    changed: dict[str, Any] = {"distil": steps}
    return [config, replace(config, **changed)]


def _line(base: Path, fine_tune: Path, ratio: float, config: Config, judge: _Judge, seeds: int, folder: Path) -> Line:
    from compressors.compress import compress

    drawn = "mask" in {one.name for one in fields(config)}
    path = folder / "delta.safetensors"
    outcomes = []
    used = _alone(base, fine_tune, config, path, folder / _HALF.format(0))
    with Artifact.open(path) as artifact:
        ratios = artifact.manifest.ratios
    for seed in tqdm(range(seeds if drawn else 1), f"{config.method} at {ratio:g}x", unit="seed"):
        if seed:
            changed: dict[str, Any] = {"seed": seed}
            compress(base, fine_tune, path, replace(config, **changed))
        outcomes.append(judge.of(path))
    kl, loss, success = (list(one) for one in zip(*outcomes, strict=True))
    settings = {name: getattr(config, name) for name in _LABELS if name in {one.name for one in fields(config)}}
    return Line(
        bytes_ratio=ratio,
        method=config.method + ("-distil" if getattr(config, "distil", 0) else ""),
        settings=settings,
        kl=kl,
        loss=loss,
        success=success,
        values=ratios.values,
        projection_bytes=ratios.projection_bytes,
        whole_file=ratios.whole_file,
        seconds=used.seconds,
        peak_mib=used.peak_mib,
    )


def _alone(base: Path, fine_tune: Path, config: Config, out: Path, text: Path) -> Used:
    """Compress in a process of its own.

    `text`: chats to distil scales on.
    """
    flags = []
    for one in fields(config):
        value = getattr(config, one.name)
        if one.name in ("ratio", "distil") or value is None or value is False:
            continue
        flags += [f"--{one.name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    if steps := getattr(config, "distil", 0):
        flags += ["--distil", "--distil-steps", str(steps), "--calibration", str(text)]
    arguments = ["delta", "compress", str(base), str(fine_tune), "-o", str(out), "--method", config.method, *flags]
    return used_by(["-m", "server.cli", *arguments])


def _save(
    path: Path | None, facts: dict[str, str], references: dict[str, tuple[float, float, float]], lines: Sequence[Line]
) -> None:
    if path is not None:
        names = ("kl", "loss", "success")
        told = {name: dict(zip(names, values, strict=True)) for name, values in references.items()}
        document = {"machine": facts, "command": command(), "references": told, "rows": [asdict(one) for one in lines]}
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _print(facts: dict[str, str], references: dict[str, tuple[float, float, float]], lines: Sequence[Line]) -> None:
    for key, value in facts.items():
        print(f"{key:>11}  {value}")
    print(f"{'command':>11}  {command()}\n")
    for name, (kl, loss, success) in references.items():
        print(f"{name:>10}: KL {kl:.4f}, loss {loss:.4f}, success {success:.1%}")
    sizes = f"{'values':>6} {'proj.':>6} {'file':>6}"
    print(f"\n{'bytes':>6} {'method':15} {'KL':>17} {'loss':>8} {'success':>15}  {sizes} {'s':>5} {'MiB':>6}  settings")
    for one in lines:
        kl_text, success_text = _spread(one.kl, "{:.4f}"), _spread(one.success, "{:.1%}")
        told = " ".join(f"{name}={value}" for name, value in one.settings.items())
        ratios = " ".join(f"{value or 0:>6.1f}" for value in (one.values, one.projection_bytes, one.whole_file))
        print(
            f"{one.bytes_ratio:>5g}x {one.method:15} {kl_text:>17} {sum(one.loss) / len(one.loss):>8.4f} {success_text:>15}"
            f"  {ratios} {one.seconds:>5.0f} {one.peak_mib:>6.0f}  {told}"
        )


def _spread(values: Sequence[float], form: str) -> str:
    """The mean, and half of the range over the seeds."""
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ±{form.format((max(values) - min(values)) / 2)}"


def plot(lines: Sequence[Line], path: Path) -> None:
    """KL over the byte ratio, a line a method, as PNG. Raises DeltaError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise DeltaError("pictures need matplotlib: pip install 'deltaworks[train]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for method in dict.fromkeys(one.method for one in lines):
        own = sorted((one for one in lines if one.method == method), key=lambda one: one.bytes_ratio)
        means = [sum(one.kl) / len(one.kl) for one in own]
        errors = [(max(one.kl) - min(one.kl)) / 2 for one in own]
        axes.errorbar([one.bytes_ratio for one in own], means, errors, marker="o", capsize=3, label=method)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="dense bytes / stored bytes of the projections",
        ylabel="KL to the fine-tune, nats",
    )
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
