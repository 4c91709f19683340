"""The probe that the stage `hidden` reads: does the model know the answer, told from its stream at the last token of the question.

P(IK) of Kadavath et al. (arXiv 2207.05221), with a logistic model of one layer instead of a value head: its target is the share of
sampled answers that are right. It is fitted on the rows that the stages are fitted on and on no others, so that calibration
and threshold see it as live requests will; the scores of those rows themselves are out of fold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from steering.activations import decoder_layers, load_model, load_tokenizer, read_streams
from steering.conflict import Probe, auroc, best_threshold, logistic_probe
from steering.errors import FitError, LabelError
from steering.gate.labels import LabelRow
from steering.gate.policy import Binding
from steering.gate.tasks import Task
from steering.header import ProbeHeader, ProfileHeader
from steering.profile import write_profile

PENALTIES = (0.03, 0.3, 3.0)  # per row; layers are compared at the middle one
_FOLDS = 5
_PER_CLASS = 2 * _FOLDS
_BATCH = 16
_IDS = "deltaworks.task_ids"


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


def record(tasks: Sequence[Task], folder: Path, layers: Sequence[int] | None, threads: int | None = None) -> Streams:
    """Streams of a model folder at the tasks' questions without tools; `layers` None: all. Raises SteeringError."""
    model, tokenizer = load_model(folder, threads), load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise LabelError(f"{folder} has no chat template, so a question is no prompt to it")
    wanted = list(range(len(decoder_layers(model)))) if layers is None else sorted(set(layers))
    prompts = [_prompt(task, tokenizer) for task in tasks]
    found: dict[int, torch.Tensor] = {}
    with tqdm(total=len(tasks), desc="reading streams", unit="question") as bar:
        for batch in _batches(prompts):
            streams = read_streams(model, torch.tensor([prompts[row] for row in batch]), wanted)
            for number, row in enumerate(batch):
                found[row] = torch.stack([streams[layer][number, -1] for layer in wanted])
            bar.update(len(batch))
    stacked = torch.stack([found[row] for row in range(len(tasks))])
    return Streams(tuple(task.id for task in tasks), {layer: stacked[:, place] for place, layer in enumerate(wanted)})


def write_streams(streams: Streams, path: Path) -> None:
    """One safetensors file, replaced as a whole."""
    temporary = path.with_name(path.name + ".tmp")
    tensors = {f"layers.{layer}": rows.contiguous() for layer, rows in streams.layers.items()}
    save_file(tensors, temporary, metadata={_IDS: json.dumps(streams.ids)})
    temporary.replace(path)


def open_streams(path: Path) -> Streams:
    """Raises FitError for another file."""
    try:
        with safe_open(path, "pt") as file:
            ids = tuple(json.loads((file.metadata() or {})[_IDS]))
            layers = {int(name.removeprefix("layers.")): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise FitError(f"{path} holds no streams of `deltaworks gate streams`: {error}") from error
    if not layers or any(len(rows) != len(ids) or not bool(torch.isfinite(rows).all()) for rows in layers.values()):
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
    trials = [(one, PENALTIES[1]) for one in streams.layers]
    found: dict[tuple[int, float], tuple[float, torch.Tensor]] = {}
    for one in tqdm(trials, desc="fitting the probe", unit="layer"):
        found[one] = _out_of_fold(streams.of(fitting, one[0]), target, fold, one)
    layer, _ = min(found, key=lambda one: found[one][0])
    for one in ((layer, penalty) for penalty in PENALTIES):
        found.setdefault(one, _out_of_fold(streams.of(fitting, layer), target, fold, one))
    layer, penalty = min(found, key=lambda one: found[one][0])
    scores = found[layer, penalty][1]
    probe = logistic_probe(streams.of(fitting, layer), target, penalty, layer)
    of_all = dict(zip([row.id for row in rows], probe.score(streams.of(rows, layer)).tolist(), strict=True))
    of_all |= dict(zip([row.id for row in fitting], scores.tolist(), strict=True))
    threshold = best_threshold(scores, known.double())
    header = ProbeHeader(
        layer=layer,
        threshold=threshold,
        auroc=auroc(scores, known),
        accuracy=float(((scores >= threshold) == known).double().mean()),
        n=len(fitting),
    )
    return Knows(probe, header, penalty, of_all)


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


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _batches(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Places of prompts of the same length, which need no padding."""
    by_length: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(place)
    for places in by_length.values():
        for first in range(0, len(places), _BATCH):
            yield places[first : first + _BATCH]


def _out_of_fold(
    h: torch.Tensor, target: torch.Tensor, fold: torch.Tensor, trial: tuple[int, float]
) -> tuple[float, torch.Tensor]:
    """Loss and scores [N] of a trial (layer, penalty), each row scored by a probe that was fitted without its fold."""
    layer, penalty = trial
    scores = torch.empty(len(h))
    for number in range(_FOLDS):
        inside = fold == number
        scores[inside] = logistic_probe(h[~inside], target[~inside], penalty, layer).score(h[inside])
    loss = torch.nn.functional.binary_cross_entropy(scores.double().clamp(1e-6, 1 - 1e-6), target)
    return float(loss), scores


def _folds(rows: int, seed: int) -> torch.Tensor:
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    fold = torch.empty(rows, dtype=torch.long)
    fold[order] = torch.arange(rows) % _FOLDS
    return fold
