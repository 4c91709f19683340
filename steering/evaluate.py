"""What an edit does to answers: how often the document's and the memorised answer are given, and which answers it changes.

Section 4 of the SpARE paper on facts that the model knows. Two kinds of prompt, each with demonstrations of the pool: "agree"
(dss), whose demonstrations answer from their contradicting documents, and "against" (dso), whose demonstrations answer truly.
SpARE is compared with no control, with ActAdd (the mean difference of the states of both classes, at the same layers and position),
and with ICL, which changes the demonstrations instead: to the document it is no control under "agree", to memory under "against".
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from steering.answers import Answerer, Rows
from steering.collected import Collected
from steering.edits import Direction, EditTable
from steering.errors import SteeringError
from steering.facts import Fact
from steering.prompts import asked_after, by_category, grouped, label, open_prompt

KINDS = {"agree": "dss", "against": "dso"}
NO_CONTROL = "no control"
ICL_KIND: dict[Direction, str] = {"use_context": "agree", "use_parameter": "against"}
Labels = list[int | None]  # per item: 1 the document's answer, 0 the memorised one, None another


@dataclass(frozen=True)
class Setting:
    """One edit to measure. `edits` are empty for no control; `about` (layers, strength, share ...) goes into the report."""

    method: str
    direction: Direction
    edits: Mapping[int, Rows]
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Rates:
    """Shares in percent: EM to the document and to memory, of all items; flips and damage, of the items that answered so unsteered
    (None where no item did)."""

    em_context: float
    em_memory: float
    context_to_memory: float | None
    memory_to_context: float | None
    memory_to_memory: float | None
    context_to_context: float | None


@dataclass(frozen=True)
class Result:
    """One line of the report: mean and population standard deviation of `Rates` over the seeds."""

    kind: str
    direction: str
    method: str
    about: dict[str, Any]
    mean: Rates
    std: Rates


@dataclass(frozen=True)
class Trial:
    """Who is asked what: items, prompt kinds and seeds of the demonstrations.

    `same_category`: as in the collection, demonstrations are of an item's own category.
    """

    items: Sequence[Fact]
    pool: Sequence[Fact]
    kinds: Sequence[str] = tuple(KINDS)
    seeds: Sequence[int] = (42, 43, 44)
    shots: int = 3
    same_category: bool = True


def spare_edits(tables: Mapping[int, EditTable]) -> dict[int, Rows]:
    """A profile's tables as changes of stream rows [B, d], in fp32, rounded once to the rows' dtype."""

    def edit(table: EditTable) -> Rows:
        return lambda rows: (rows.float() + table.delta(rows.float())).to(rows.dtype)

    return {layer: edit(table) for layer, table in tables.items()}


def act_add_edits(
    collected: Collected, layers: Iterable[int], direction: Direction, strength: float
) -> dict[int, Rows]:
    """ActAdd: plus (to the document) or minus (to memory) `strength` times the mean state of class 1 less that of class 0."""

    def edit(vector: torch.Tensor) -> Rows:
        return lambda rows: (rows.float() + vector).to(rows.dtype)

    sign = strength if direction == "use_context" else -strength
    found = {}
    for layer in layers:
        samples = collected.samples(layer)
        of_context = samples.labels == 1
        found[layer] = edit(sign * (samples.h[of_context].mean(0) - samples.h[~of_context].mean(0)))
    return found


def measure(answerer: Answerer, trial: Trial, settings: Sequence[Setting]) -> list[Result]:
    """All settings on all prompts, with no control and ICL. Raises SteeringError when nothing can be asked."""
    if not trial.items:
        raise SteeringError("no item to ask: the model knows no fact outside the pool")
    if unknown := set(trial.kinds) - set(KINDS):
        raise SteeringError(f"prompt kind {min(unknown)!r} is not one of {', '.join(KINDS)}")
    plain: dict[tuple[str, int], Labels] = {}
    edited: dict[tuple[str, int], list[Labels]] = {}
    total = len(trial.kinds) * len(trial.seeds) * len(trial.items)
    with tqdm(total=total, desc="evaluating", unit="prompt") as bar:
        for kind in trial.kinds:
            for seed in trial.seeds:
                found = _answered(answerer, trial, kind, seed, settings, bar)
                plain[kind, seed], edited[kind, seed] = found[0], found[1:]
    results = []
    for kind in trial.kinds:
        base = [plain[kind, seed] for seed in trial.seeds]
        results.append(_result(kind, "", NO_CONTROL, {}, base, base))
        for number, one in enumerate(settings):
            after = [edited[kind, seed][number] for seed in trial.seeds]
            results.append(_result(kind, one.direction, one.method, dict(one.about), base, after))
        for direction, other in ICL_KIND.items():
            if other != kind and other in trial.kinds:
                after = [plain[other, seed] for seed in trial.seeds]
                results.append(_result(kind, direction, "ICL", {}, base, after))
    return results


def draw(items: Sequence[Fact], most: int | None, seed: int = 42) -> list[Fact]:
    """At most `most` of the items, always the same ones, in their order."""
    if most is None or most >= len(items):
        return list(items)
    kept = set(random.Random(seed).sample(range(len(items)), most))
    return [item for index, item in enumerate(items) if index in kept]


def rates(before: Labels, after: Labels) -> Rates:
    """Of the answers to the same items without and with an edit."""

    def share(was: int | None, now: int) -> float | None:
        of = [b for a, b in zip(before, after, strict=True) if was is None or a == was]
        return 100 * sum(b == now for b in of) / len(of) if of else None

    em_context, em_memory = share(None, 1), share(None, 0)
    assert em_context is not None
    assert em_memory is not None
    return Rates(em_context, em_memory, share(1, 0), share(0, 1), share(0, 0), share(1, 1))


def table(results: Sequence[Result]) -> str:
    """Lines of text, a column per rate."""
    columns = ["prompt", "direction", "method", "EM_C", "EM_M", "C->M", "M->C", "M->M", "C->C"]
    lines = [columns]
    for one in results:
        about = " ".join(f"{name}={_short(value)}" for name, value in one.about.items())
        means, stds = asdict(one.mean).values(), asdict(one.std).values()
        cells = ["-" if mean is None else f"{mean:.1f}±{std or 0:.1f}" for mean, std in zip(means, stds, strict=True)]
        lines.append([one.kind, one.direction or "-", f"{one.method} {about}".strip(), *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _answered(
    answerer: Answerer, trial: Trial, kind: str, seed: int, settings: Sequence[Setting], bar: tqdm[Any]
) -> list[Labels]:
    """Labels of every item: first without an edit, then per setting."""
    found: list[Labels] = [[None] * len(trial.items) for _ in range(len(settings) + 1)]
    for shown, numbers in demonstrated(trial, seed):
        prompts = [answerer.tokens(open_prompt(shown, KINDS[kind], trial.items[number])) for number in numbers]
        for batch in answerer.prefill(prompts):
            for labels, edits in zip(found, [{}, *(one.edits for one in settings)], strict=True):
                answers = answerer.answers(answerer.end(batch, edits))
                for row, answer in zip(batch.rows, answers, strict=True):
                    labels[numbers[row]] = label(answer, trial.items[numbers[row]])
            bar.update(len(batch.rows))
    return found


def demonstrated(trial: Trial, seed: int) -> list[tuple[Sequence[Fact], list[int]]]:
    """(demonstrations, indices of the items asked after them): the first groups of the shuffled pool, as the authors take them,
    those of the items' category before others.

    Items of these groups (when the pool itself is measured) are asked after the next groups.
    """
    groups = grouped(trial.pool)
    names = list(groups)
    if len(names) < 2 * trial.shots:
        raise SteeringError(f"a pool of {len(names)} groups is too small for {2 * trial.shots} demonstrations")
    random.Random(seed).shuffle(names)
    parts: list[tuple[Sequence[Fact], list[int]]] = []
    for category, rows in by_category(trial.items, trial.same_category).items():
        kin = {name for name in names if category and groups[name][0].category == category}
        order = [name for name in names if name in kin] + [name for name in names if name not in kin]
        drawn = [groups[name][0] for name in order[: 2 * trial.shots]]
        parts += asked_after(drawn[: trial.shots], drawn[trial.shots :], trial.items, rows)
    return parts


def _result(
    kind: str, direction: str, method: str, about: dict[str, Any], before: Sequence[Labels], after: Sequence[Labels]
) -> Result:
    each = [asdict(rates(one, other)) for one, other in zip(before, after, strict=True)]
    mean: dict[str, Any] = {}
    std: dict[str, Any] = {}
    for name in each[0]:
        values = [one[name] for one in each if one[name] is not None]
        mean[name] = statistics.fmean(values) if values else None
        std[name] = statistics.pstdev(values) if values else None
    return Result(kind, direction, method, about, Rates(**mean), Rates(**std))


def _short(value: Any) -> str:
    return (
        ",".join(map(str, value))
        if isinstance(value, list | tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
