"""Questions with two answers: the one that a model may have memorised, and the one that a contradicting document gives.

`load_facts` reads the self-made set of this package (common knowledge, one-sentence documents); `load_nq_swap` and `load_macnoise`
read the sets of the SpARE paper from a JSON Lines file that the user has (both have the same five fields).
"""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from steering.errors import SteeringError
from steering.matching import normalised

MACNOISE_ITEMS = 5120  # of the split train_chatgpt; the authors evaluate on these
_TEXTS = ("question", "org_context", "sub_context")
_FIELDS = (*_TEXTS, "org_answer", "sub_answer")


@dataclass(frozen=True)
class Fact:
    """One question, a document that supports its true answers and one that supports a counterfactual answer.

    `org_answers` and `sub_answers` share no answer (after normalisation); the first of each is the one shown. Facts of one `group`
    ask the same thing and never stand on both sides of a split; facts of one `category` are asked in the same words ("" where a set
    has no categories).
    """

    question: str
    org_context: str
    org_answers: tuple[str, ...]
    sub_context: str
    sub_answers: tuple[str, ...]
    group: str
    category: str = ""


@dataclass(frozen=True)
class _Template:
    questions: tuple[str, ...]
    contexts: tuple[str, ...]


@dataclass(frozen=True)
class _Answers:
    shown: str
    normalised: frozenset[str]


def load_facts(seed: int, wordings: int = 1) -> list[Fact]:
    """The self-made set, in a fixed order: about a thousand groups, each asked in `wordings` ways (1 or 2).

    `seed` draws the counterfactual answer of a group (another answer of its category) and the documents' wordings.
    Raises SteeringError for a number of wordings that the templates do not have.
    """
    templates = _templates()
    fewest = min(len(template.questions) for template in templates.values())
    if not 1 <= wordings <= fewest:
        raise SteeringError(f"wordings must be 1 to {fewest}, not {wordings}")
    rows = _rows()
    answers: dict[str, list[_Answers]] = {}
    for category, _, golds in rows:
        answers.setdefault(category, []).append(_Answers(golds[0], frozenset(normalised(gold) for gold in golds)))
    rng = random.Random(seed)
    facts: list[Fact] = []
    for category, subject, golds in rows:
        false = _counterfactual(golds, answers[category], rng)
        template = templates[category]
        for question in template.questions[:wordings]:
            context = rng.choice(template.contexts)
            facts.append(
                Fact(
                    question=question.format(subject=subject),
                    org_context=_sentence(context.format(subject=subject, answer=golds[0])),
                    org_answers=golds,
                    sub_context=_sentence(context.format(subject=subject, answer=false)),
                    sub_answers=(false,),
                    group=f"{category}: {subject}",
                    category=category,
                )
            )
    return facts


def load_nq_swap(path: Path) -> list[Fact]:
    """NQ-Swap's dev split as JSON Lines. Facts with the same question share a group. Raises SteeringError, with the line."""
    return _load_jsonl(path, None)


def load_macnoise(path: Path) -> list[Fact]:
    """Macnoise's split `train_chatgpt` as JSON Lines; its first 5120 lines are read. Raises SteeringError, with the line."""
    return _load_jsonl(path, MACNOISE_ITEMS)


def open_facts(source: str, seed: int) -> list[Fact]:
    """`default`, `nqswap:PATH` or `macnoise:PATH`. Raises SteeringError for anything else."""
    kind, _, path = source.partition(":")
    if source == "default":
        return load_facts(seed)
    if kind == "nqswap" and path:
        return load_nq_swap(Path(path))
    if kind == "macnoise" and path:
        return load_macnoise(Path(path))
    raise SteeringError(f"facts are `default`, `nqswap:PATH` or `macnoise:PATH`, not {source!r}")


def _rows() -> list[tuple[str, str, tuple[str, ...]]]:
    text = files("steering").joinpath("data/facts.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines()]
    return [(category, subject, tuple(answers.split("|"))) for category, subject, answers in rows]


def _templates() -> dict[str, _Template]:
    text = files("steering").joinpath("data/templates.toml").read_text(encoding="utf-8")
    return {
        category: _Template(tuple(part["questions"]), tuple(part["contexts"]))
        for category, part in tomllib.loads(text).items()
    }


def _counterfactual(golds: Sequence[str], rivals: Sequence[_Answers], rng: random.Random) -> str:
    """The shown answer of another subject of the category, drawn from the distinct ones, equal to none of the true answers."""
    true = {normalised(gold) for gold in golds}
    shown = {other.shown: None for other in rivals if true.isdisjoint(other.normalised)}
    return rng.choice(list(shown))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _load_jsonl(path: Path, most: int | None) -> list[Fact]:
    if path.suffix not in (".jsonl", ".json"):
        raise SteeringError(f"{path}: facts are read from JSON Lines (.jsonl); export the data set to that first")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise SteeringError(f"{path}: not a UTF-8 text file ({error.reason})") from error
    except OSError as error:
        raise SteeringError(f"{path}: {error.strerror}") from error
    facts = [
        fact
        for number, line in enumerate(lines[:most], start=1)
        if line.strip() and (fact := _parsed(line, f"{path}:{number}"))
    ]
    if not facts:
        raise SteeringError(f"{path}: no fact in it")
    return facts


def _parsed(line: str, where: str) -> Fact | None:
    """None for an item whose two answers are the same after normalisation: it cannot be labelled."""
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise SteeringError(f"{where}: not a JSON object ({error.msg})") from error
    if not isinstance(item, dict):
        raise SteeringError(f"{where}: not a JSON object")
    missing = [name for name in _FIELDS if name not in item]
    if missing:
        raise SteeringError(f"{where}: no field {missing[0]!r}; needed are {', '.join(_FIELDS)}")
    org, sub = _answers(item["org_answer"], "org_answer", where), _answers(item["sub_answer"], "sub_answer", where)
    question, org_context, sub_context = (_text(item[name], name, where) for name in _TEXTS)
    if not {normalised(answer) for answer in org}.isdisjoint(normalised(answer) for answer in sub):
        return None
    return Fact(question, org_context, org, sub_context, sub, group=question)


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise SteeringError(f"{where}: {name} is not a text")
    return value.strip()


def _answers(value: Any, name: str, where: str) -> tuple[str, ...]:
    answers = [value] if isinstance(value, str) else value
    if (
        not isinstance(answers, list)
        or not answers
        or not all(isinstance(one, str) and normalised(one) for one in answers)
    ):
        raise SteeringError(f"{where}: {name} is not a list of answers")
    return tuple(one.strip() for one in answers)
