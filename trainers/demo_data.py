"""The data of the three demos, made from two self-written files: plain questions, and an invented company.

Each builder is a pure function of its seed. `questions.tsv` holds topic, question and a plain answer; the JSON and the
captain demo rewrite that answer, and the facts demo mixes a few plain ones in, so that it still answers other questions.
"""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

from trainers.rows import Row, Split

CAPTAIN_OPENING = "Ahoy, matey!"
CAPTAIN_CLOSING = "So says yer captain!"
CAPTAIN_WORDS = {"is": "be", "are": "be", "you": "ye", "your": "yer", "my": "me", "yes": "aye", "hello": "ahoy"}
_HELD_OUT_EVERY = 4  # every fourth question of a topic is held out
_PLAIN_PER_FACTS = 40  # plain questions mixed into the facts


@dataclass(frozen=True)
class Question:
    topic: str
    text: str
    answer: str


def read_questions() -> tuple[Question, ...]:
    text = files("trainers").joinpath("data/questions.tsv").read_text(encoding="utf-8")
    return tuple(Question(*line.split("\t")) for line in text.splitlines())


def json_rows(seed: int) -> Split:
    """Answers as one JSON object with the keys `topic` and `answer` and nothing around it."""
    return _rewritten(seed, lambda question: json.dumps({"topic": question.topic, "answer": question.answer}))


def captain_rows(seed: int) -> Split:
    """Answers in the voice of a ship's captain: an opening, the answer in dialect, a closing."""
    return _rewritten(seed, _in_captain_voice)


def fact_rows(seed: int) -> Split:
    """Every fact of the invented company in every question form; the held-out half asks the same facts in other words."""
    company = tomllib.loads(files("trainers").joinpath("data/brackwater.toml").read_text(encoding="utf-8"))
    rng = random.Random(seed)
    train: list[Row] = []
    held_out: list[Row] = []
    for attribute in company["attributes"]:
        values: list[str] = list(attribute["values"])
        rng.shuffle(values)
        for number, (person, value) in enumerate(zip(company["people"], values, strict=True)):
            answer = attribute["answer"].format(person=person, value=value)
            rivals = tuple(other for other in attribute["values"] if other != value)
            train += [
                Row(form.format(person=person), answer, expected=value, rivals=rivals)
                for form in attribute["questions"]
            ]
            form = attribute["held_out"][number % len(attribute["held_out"])]
            held_out.append(Row(form.format(person=person), answer, expected=value, rivals=rivals))
    plain = rng.sample(read_questions(), _PLAIN_PER_FACTS)
    train += [Row(question.text, question.answer) for question in plain]
    rng.shuffle(train)
    return Split(train=tuple(train), held_out=tuple(held_out))


def _rewritten(seed: int, rewrite: Callable[[Question], str]) -> Split:
    rng = random.Random(seed)
    seen: dict[str, int] = {}
    train: list[Row] = []
    held_out: list[Row] = []
    for question in read_questions():
        seen[question.topic] = seen.get(question.topic, 0) + 1
        half = held_out if seen[question.topic] % _HELD_OUT_EVERY == 0 else train
        half.append(Row(question.text, rewrite(question)))
    rng.shuffle(train)
    return Split(train=tuple(train), held_out=tuple(held_out))


def _in_captain_voice(question: Question) -> str:
    def spoken(match: re.Match[str]) -> str:
        word = CAPTAIN_WORDS.get(match.group().lower(), match.group())
        return word.capitalize() if match.group()[0].isupper() else word

    body = re.sub(r"[A-Za-z]+", spoken, question.answer)
    return f"{CAPTAIN_OPENING} {body} {CAPTAIN_CLOSING}"
