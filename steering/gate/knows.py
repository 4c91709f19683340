"""The probe that the stage `hidden` reads: does the model know the answer, told from its stream at the last token of the question.

P(IK) of Kadavath et al. (arXiv 2207.05221), with a logistic model of one layer instead of a value head: its target is the share of
sampled answers that are right. It is fitted on the rows that the stages are fitted on and on no others, so that calibration
and threshold see it as live requests will; the scores of those rows themselves are out of fold.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from steering.activations import decoder_layers, load_model, load_tokenizer, read_streams
from steering.collected import write_states
from steering.conflict import Probe, auroc, best_threshold, logistic_probe
from steering.errors import FitError, LabelError
from steering.gate.labels import LabelRow
from steering.gate.policy import Binding
from steering.gate.tasks import Task
from steering.header import ProbeHeader, ProfileHeader
from steering.profile import write_profile

PENALTIES = (0.3, 0.03, 3.0)  # per row; layers are compared at the first one
_FOLDS = 5
_PER_CLASS = 2 * _FOLDS
_BATCH = 16
_IDS = "task_ids"
_UNREADABLE = (OSError, SafetensorError, ValueError, KeyError)
_SAVE_EVERY_S = 30.0


@dataclass(frozen=True)
class Streams:
    """The stream at the last prompt token, layer -> [N, d], of the tasks `ids` [N]."""

    ids: tuple[str, ...]
    layers: Mapping[int, torch.Tensor]

    def of(self, rows: Sequence[LabelRow], layer: int) -> torch.Tensor:
        """Raises FitError where a row is not among the tasks."""
        place = {name: number for number, name in enumerate(self.ids)}
        missing = [row.id for row in rows if row.id not in place]
        if missing:
            raise FitError(f"the streams hold no task {missing[0]!r} ({len(missing)} of {len(rows)} rows are missing)")
        return self.layers[layer][[place[row.id] for row in rows]]


@dataclass(frozen=True)
class Knows:
    """The probe, what it is worth on the rows that it was fitted on (out of fold), and the score of every row by id."""

    probe: Probe
    header: ProbeHeader
    penalty: float
    scores: Mapping[str, float]


@dataclass(frozen=True)
class _Trial:
    """`scores` [N]: of every row by a probe that was fitted without its fold; their mean log-loss."""

    layer: int
    penalty: float
    loss: float
    scores: torch.Tensor


def record(
    tasks: Sequence[Task],
    folder: Path,
    layers: Sequence[int] | None,
    threads: int | None = None,
    part: Path | None = None,
) -> Streams:
    """Streams of a model folder at the tasks' questions without tools; `layers` None: all. Raises SteeringError.

    What was read is kept in the file `part` now and then, and where it ends early; the next call goes on from there.
    """
    model, tokenizer = load_model(folder, threads), load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise LabelError(f"{folder} has no chat template, so a question is no prompt to it")
    wanted = list(range(len(decoder_layers(model)))) if layers is None else sorted(set(layers))
    prompts = [_prompt(task, tokenizer) for task in tasks]
    names = [_name_of(prompt) for prompt in prompts]
    about = {"model": _identity(folder), "layers": wanted}
    found = {} if part is None else _read_part(part, about)
    left = [place for place, name in enumerate(names) if name not in found]
    saved = time.monotonic()
    with tqdm(total=len(tasks), initial=len(tasks) - len(left), desc="reading streams", unit="question") as bar:
        try:
            for batch in _batches({place: prompts[place] for place in left}):
                streams = read_streams(model, torch.tensor([prompts[place] for place in batch]), wanted)
                for number, place in enumerate(batch):
                    found[names[place]] = torch.stack([streams[layer][number, -1] for layer in wanted])
                bar.update(len(batch))
                if part is not None and time.monotonic() - saved > _SAVE_EVERY_S:
                    write_states(part, found, about)
                    saved = time.monotonic()
        finally:
            if part is not None:
                write_states(part, found, about)
    stacked = torch.stack([found[name] for name in names])
    return Streams(tuple(task.id for task in tasks), {layer: stacked[:, place] for place, layer in enumerate(wanted)})


def write_streams(streams: Streams, path: Path) -> None:
    """One safetensors file, replaced as a whole."""
    tensors = {f"layers.{layer}": rows for layer, rows in streams.layers.items()}
    write_states(path, tensors, {_IDS: streams.ids})


def open_streams(path: Path) -> Streams:
    """Raises FitError for another file."""
    try:
        tensors, rows = _read(path)
        ids = tuple(rows[_IDS])
        layers = {int(name.removeprefix("layers.")): states for name, states in tensors.items()}
    except _UNREADABLE as error:
        raise FitError(f"{path} holds no streams of `deltaworks gate streams`: {error}") from error
    if not layers or any(len(one) != len(ids) or not bool(torch.isfinite(one).all()) for one in layers.values()):
        raise FitError(f"{path} is damaged: not one finite row per task and layer")
    return Streams(ids, dict(sorted(layers.items())))


def fit_knows(
    rows: Sequence[LabelRow], fitting: Sequence[LabelRow], streams: Streams, r: float, seed: int = 0
) -> Knows:
    """The layer of least out-of-fold loss on `fitting`, and then the penalty; all of `fitting` fits it, and `rows` are scored.

    Raises FitError for too few rows of a class.
    """
    known = torch.tensor([row.p_known >= r for row in fitting])
    if min(int(known.sum()), int((~known).sum())) < _PER_CLASS:
        raise FitError(
            f"the probe of hidden needs {_PER_CLASS} known and {_PER_CLASS} unknown rows to fit on; "
            f"there are {int(known.sum())} and {int((~known).sum())}"
        )
    target = torch.tensor([row.p_known for row in fitting], dtype=torch.float64)
    fold = _folds(len(fitting), seed)
    first, *others = PENALTIES
    found = [
        _out_of_fold(streams, fitting, target, fold, layer, first)
        for layer in tqdm(streams.layers, desc="fitting the probe", unit="layer")
    ]
    layer = min(found, key=lambda trial: trial.loss).layer
    found += [_out_of_fold(streams, fitting, target, fold, layer, penalty) for penalty in others]
    best = min(found, key=lambda trial: trial.loss)
    probe = logistic_probe(streams.of(fitting, best.layer), target, best.penalty, best.layer)
    of_all = dict(zip([row.id for row in rows], probe.score(streams.of(rows, best.layer)).tolist(), strict=True))
    of_all |= dict(zip([row.id for row in fitting], best.scores.tolist(), strict=True))
    threshold = best_threshold(best.scores, known.double())
    header = ProbeHeader(
        layer=best.layer,
        threshold=threshold,
        auroc=auroc(best.scores, known),
        accuracy=float(((best.scores >= threshold) == known).double().mean()),
        n=len(fitting),
    )
    return Knows(probe, header, best.penalty, of_all)


def write_knows(knows: Knows, bound: Binding, path: Path) -> None:
    """The probe as a steering profile without directions, which a server keeps and reads like any other. Raises ProfileError."""
    header = ProfileHeader(
        base_fingerprint=bound.base_fingerprint,
        model_name=bound.name,
        template_sha256="",
        d_in=len(knows.probe.weight),
        fit={"purpose": "known without tools", "delta_digest": bound.delta_digest, "penalty": knows.penalty},
        probe=knows.header,
    )
    write_profile(path, header, {}, knows.probe)


def with_scores(rows: Sequence[LabelRow], knows: Knows) -> tuple[LabelRow, ...]:
    """The rows with the feature of `hidden`; a score that a server gave before is replaced."""
    return tuple(
        row.model_copy(
            update={
                "features": {**row.features, "hidden": {"hidden.score": knows.scores[row.id]}},
                "tokens": {**row.tokens, "hidden": 1},
            }
        )
        if row.id in knows.scores
        else row
        for row in rows
    )


def _prompt(task: Task, tokenizer: Any) -> list[int]:
    from jinja2 import TemplateError  # came with transformers

    try:
        text = tokenizer.apply_chat_template(task.dialogue, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError) as error:  # it is a program, and refuses a dialogue in its own way
        raise LabelError(f"task {task.id!r}: the chat template refuses its messages: {error}") from error
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def _batches(prompts: Mapping[int, Sequence[int]]) -> Iterator[list[int]]:
    """Places of prompts of the same length, which need no padding."""
    by_length: dict[int, list[int]] = {}
    for place, prompt in prompts.items():
        by_length.setdefault(len(prompt), []).append(place)
    for places in by_length.values():
        for first in range(0, len(places), _BATCH):
            yield places[first : first + _BATCH]


def _name_of(prompt: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest()


def _identity(folder: Path) -> str:
    """A model folder as it is now: another fine-tune written to its place is another model."""
    weights = [(one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in sorted(folder.glob("*.safetensors"))]
    return json.dumps([str(folder.resolve()), weights])


def _read_part(path: Path, about: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Streams [layers, d] by prompt; none where the file is not there, damaged, or of another model or other layers."""
    try:
        tensors, rows = _read(path)
    except _UNREADABLE:
        return {}
    return tensors if rows == about else {}


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `write_states` wrote. Raises what is _UNREADABLE."""
    with safe_open(path, "pt") as file:
        rows: dict[str, Any] = json.loads((file.metadata() or {})["rows"])
        return {name: file.get_tensor(name) for name in file.keys()}, rows  # noqa: SIM118  # it is no dict


def _out_of_fold(
    streams: Streams, fitting: Sequence[LabelRow], target: torch.Tensor, fold: torch.Tensor, layer: int, penalty: float
) -> _Trial:
    h = streams.of(fitting, layer)
    scores = torch.empty(len(h))
    for number in range(_FOLDS):
        inside = fold == number
        scores[inside] = logistic_probe(h[~inside], target[~inside], penalty, layer).score(h[inside])
    loss = torch.nn.functional.binary_cross_entropy(scores.double().clamp(1e-6, 1 - 1e-6), target)
    return _Trial(layer, penalty, float(loss), scores)


def _folds(rows: int, seed: int) -> torch.Tensor:
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    fold = torch.empty(rows, dtype=torch.long)
    fold[order] = torch.arange(rows) % _FOLDS
    return fold
