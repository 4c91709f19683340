"""Collect what SpARE is fitted on: states at the last prompt token, labelled by which source the model then answered from.

Section 3.1 of the paper, by the authors' code: facts that the model answers without a document are "memorised"; the groups of a
pool are asked again under a contradicting document, after demonstrations of three styles that push the model one way or the other.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from steering.activations import decoder_layers, load_model, load_tokenizer
from steering.answers import Answerer
from steering.collected import (
    Collected,
    CollectSettings,
    Known,
    claim,
    probe_file,
    read_facts,
    read_known,
    shard_file,
    write_facts,
    write_known,
    write_states,
)
from steering.errors import SteeringError
from steering.facts import Fact, open_facts
from steering.matching import exact_match
from steering.prompts import (
    CLOSED_BOOK_SHOTS,
    STYLES,
    asked_after,
    by_category,
    closed_prompt,
    grouped,
    label,
    open_prompt,
    sample_demonstrations,
    split_groups,
)

_PROBE_SHOTS = 4


@dataclass(frozen=True)
class AskedPrompt:
    fact: Fact
    ids: list[int]


def collect(settings: CollectSettings, out: Path, batch_size: int = 16, threads: int | None = None) -> Collected:
    """Make a collection, or go on with one that was interrupted. Raises SteeringError."""
    _check(settings)
    facts = _facts(settings)
    claim(out, settings)
    folder = Path(settings.model)
    model, tokenizer = load_model(folder, threads), load_tokenizer(folder)
    answerer = Answerer(model, tokenizer, batch_size)
    if (deepest := max(settings.layers)) >= len(decoder_layers(model)):
        raise SteeringError(f"layer {deepest} is not within the model's 0 to {len(decoder_layers(model)) - 1}")
    if not (out / "memorised.json").is_file():
        write_facts(out, facts)
        write_known(out, closed_book(facts, answerer, settings))
    facts, known = read_facts(out), read_known(out)
    pool = [fact for fact in facts if fact.group in set(known.split.pool)]
    units = [(style, shots, seed) for seed in settings.seeds for shots in settings.shots for style in settings.styles]
    with tqdm(total=len(units) * len(pool), desc="collecting", unit="prompt") as bar:
        done = 0
        for style, shots, seed in units:
            path = shard_file(out, style, shots, seed)
            if not path.is_file():
                parts = unit_prompts(pool, style, shots, seed, settings, answerer)
                about = {"style": style, "shots": shots, "seed": seed}
                _write_shard(path, parts, answerer, settings.layers, about, bar)
            done += len(pool)
            bar.update(done - bar.n)
    if not probe_file(out).is_file():
        _write_probe(out, facts, known, answerer, settings)
    return Collected.open(out)


def closed_book(facts: Sequence[Fact], answerer: Answerer, settings: CollectSettings) -> Known:
    """Which facts the model answers after solved questions without documents, and the split that follows from it.

    The demonstrations are one fixed draw per category, and a second one for the facts in it. Raises SteeringError when too few
    groups are known.
    """
    answers = [""] * len(facts)
    with tqdm(total=len(facts), desc="closed book", unit="question") as bar:
        for category, rows in by_category(facts, settings.same_category).items():
            groups = grouped([facts[row] for row in rows])
            shots = min(CLOSED_BOOK_SHOTS, len(groups) // 2)
            rng = random.Random(f"{settings.fact_seed}/{category}")
            drawn = sample_demonstrations(groups, 2 * shots, None, rng)
            for demonstrations, of_part in asked_after(drawn[:shots], drawn[shots:], facts, rows):
                prompts = [answerer.tokens(closed_prompt(demonstrations, facts[row])) for row in of_part]
                for batch in answerer.prefill(prompts):
                    for index, answer in zip(batch.rows, answerer.answers(answerer.end(batch)), strict=True):
                        answers[of_part[index]] = answer
                    bar.update(len(batch.rows))
    memorised = [exact_match(answer, fact.org_answers) for answer, fact in zip(answers, facts, strict=True)]
    known = {fact.group for fact, right in zip(facts, memorised, strict=True) if right}
    pool = min(settings.pool, len(known) // 2)
    if pool <= max(settings.shots):
        raise SteeringError(
            f"the model knows {len(known)} of {len(grouped(facts))} groups of facts; half of them are too few for "
            f"{max(settings.shots)} demonstrations and an item"
        )
    return Known(tuple(answers), tuple(memorised), split_groups(sorted(known), pool))


def _check(settings: CollectSettings) -> None:
    if not settings.layers or min(settings.layers) < 0:
        raise SteeringError("give the layers to collect, counted from 0")
    for name in ("layers", "shots", "seeds", "styles"):
        values = getattr(settings, name)
        if not values or len(set(values)) != len(values):
            raise SteeringError(f"{name} must be different from each other and at least one, not {list(values)}")
    if unknown := set(settings.styles) - set(STYLES):
        raise SteeringError(f"style {min(unknown)!r} is not one of {', '.join(STYLES)}")
    if settings.demonstrations not in ("shared", "per-item"):
        raise SteeringError(f"demonstrations are shared or per-item, not {settings.demonstrations!r}")
    if min(settings.shots) < 1 or settings.pool < 2:
        raise SteeringError("at least one demonstration and a pool of two groups are needed")


def _facts(settings: CollectSettings) -> list[Fact]:
    facts = open_facts(settings.facts, settings.fact_seed)
    if settings.limit is None or settings.limit >= len(facts):
        return facts
    if settings.limit < 1:
        raise SteeringError("--limit must be at least 1")
    return random.Random(settings.fact_seed).sample(facts, settings.limit)


def unit_prompts(
    pool: Sequence[Fact], style: str, shots: int, seed: int, settings: CollectSettings, answerer: Answerer
) -> list[list[AskedPrompt]]:
    """Prompts of one unit, in lists of the same demonstrations where these are shared. The demonstrations do not hang on the style,
    so that styles differ in nothing else.

    Shared demonstrations leave out the items whose own group is shown. Prompts beyond the model's context are left out.
    """
    groups = grouped(pool)
    longest = int(getattr(answerer.model.config, "max_position_embeddings", 1 << 30)) - answerer.max_new_tokens
    parts = []
    for category, rows in by_category(pool, settings.same_category).items():
        draw = f"{seed}/{shots}/{category}"
        shared = sample_demonstrations(groups, shots, None, random.Random(draw), category)
        found = []
        for row in rows:
            fact, shown = pool[row], shared
            if settings.demonstrations == "per-item":
                shown = sample_demonstrations(groups, shots, fact.group, random.Random(f"{draw}/{row}"), category)
            if fact.group in {one.group for one in shown}:
                continue
            ids = answerer.tokens(open_prompt(shown, style, fact))
            if len(ids) <= longest:
                found.append(AskedPrompt(fact, ids))
        if found:
            parts.append(found)
    return parts


def _write_shard(
    path: Path,
    parts: Sequence[Sequence[AskedPrompt]],
    answerer: Answerer,
    layers: Sequence[int],
    about: dict[str, Any],
    bar: tqdm[Any],
) -> None:
    counts = {"context": 0, "memory": 0, "neither": 0}
    kept: list[tuple[Fact, int, float, float, str]] = []  # item, label, losses, prediction
    states: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    batches = ((part, batch) for part in parts for batch in answerer.prefill([one.ids for one in part], losses=True))
    for part, batch in batches:
        ended = answerer.end(batch, layers=layers)
        facts = [part[row].fact for row in batch.rows]
        conflict = answerer.mean_losses(ended, [_answer_ids(fact.sub_answers[0], answerer) for fact in facts])
        original = answerer.mean_losses(ended, [_answer_ids(fact.org_answers[0], answerer) for fact in facts])
        for index, answer in enumerate(answerer.answers(ended)):
            found = label(answer, facts[index])
            counts["neither" if found is None else "context" if found else "memory"] += 1
            if found is not None:
                kept.append((facts[index], found, conflict[index], original[index], answer))
                for layer in layers:
                    states[layer].append(ended.streams[layer][index])
        bar.update(len(facts))
    width = answerer.model.config.hidden_size
    tensors = {
        f"states.{layer}": torch.stack(rows) if rows else torch.zeros(0, width) for layer, rows in states.items()
    }
    tensors["labels"] = torch.tensor([row[1] for row in kept], dtype=torch.int8)
    tensors["conflict_losses"] = torch.tensor([row[2] for row in kept], dtype=torch.float32)
    tensors["original_losses"] = torch.tensor([row[3] for row in kept], dtype=torch.float32)
    rows = {"groups": [row[0].group for row in kept], "predictions": [row[4] for row in kept]}
    write_states(path, tensors, about | {"counts": counts} | rows)


def _answer_ids(answer: str, answerer: Answerer) -> list[int]:
    """Tokens of an answer as they follow `answer:`."""
    colon = answerer.tokens("answer:")
    return answerer.tokens(f"answer: {answer}")[len(colon) :]


def _write_probe(out: Path, facts: Sequence[Fact], known: Known, answerer: Answerer, settings: CollectSettings) -> None:
    """The same memorised items under the contradicting and under the true document, after demonstrations that answer truly."""
    rng = random.Random(settings.fact_seed)
    memorised = [fact for fact, right in zip(facts, known.memorised, strict=True) if right]
    items = rng.sample(memorised, min(settings.probe_items, len(memorised)))
    groups = grouped([fact for fact in facts if fact.group in set(known.split.pool)])
    shots = min(_PROBE_SHOTS, len(groups) - 1)
    layers = range(len(decoder_layers(answerer.model)))
    states: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    labels: list[int] = []
    names: list[str] = []
    with tqdm(total=2 * len(items), desc="probe data", unit="prompt") as bar:
        for number, seed in enumerate(settings.seeds):
            mine = items[number :: len(settings.seeds)]
            for category, of_category in by_category(mine, settings.same_category).items():
                shown = sample_demonstrations(groups, shots, None, random.Random(f"probe/{seed}/{category}"), category)
                asked = [mine[row] for row in of_category if mine[row].group not in {one.group for one in shown}]
                rows = [(fact, context) for fact in asked for context in ("sub", "org")]
                prompts = [answerer.tokens(open_prompt(shown, "doo", fact, context)) for fact, context in rows]
                for batch in answerer.prefill(prompts) if prompts else ():
                    streams = answerer.end(batch, layers=layers).streams
                    for layer in layers:
                        states[layer].append(streams[layer])
                    labels += [int(rows[row][1] == "sub") for row in batch.rows]
                    names += [rows[row][0].group for row in batch.rows]
                    bar.update(len(batch.rows))
    tensors = {f"states.{layer}": torch.cat(parts) for layer, parts in states.items()}
    tensors["labels"] = torch.tensor(labels, dtype=torch.int8)
    write_states(probe_file(out), tensors, {"groups": names})
