"""A world with known truth to measure tool use in: sums of four sizes, and the entries of an invented archive.

Half of the archive's facts are trained into the model, half are in the archive only. Which half is chosen by the seed,
fact by fact, so that nothing in a question tells them apart. Of some of the latter, the gaps, the model is told that it does not
know them, so that it learns where its knowledge ends; nobody asks it those again.
"""

from __future__ import annotations

import json
import random
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

Operator = Literal["+", "-", "*"]
OPERATORS: tuple[Operator, ...] = ("+", "-", "*")
SIZES = (1, 2, 3, 4)  # of the sums; the first two are trained
WORDS: dict[Operator, str] = {"+": "plus", "-": "minus", "*": "times"}
SUM_QUESTIONS = (
    "What is {a} {sign} {b}?",
    "Calculate {a} {word} {b}.",
    "How much is {a} {word} {b}?",
    "{a} {sign} {b}",
)
HELD_OUT_SUM_QUESTIONS = (
    "Work out {a} {word} {b}.",
    "What do you get for {a} {sign} {b}?",
    "Give me {a} {word} {b}.",
)


def _tool(name: str, description: str, *arguments: str) -> dict[str, Any]:
    properties = {argument: {"type": "string"} for argument in arguments}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


CALCULATOR = _tool("calculator", "Compute numbers.", "expression")
LOOKUP = _tool("lookup", "Find an entry of the archive.", "key")
SEND_MESSAGE = _tool("send_message", "Send a message to a person.", "to", "text")
ASK_USER = _tool("ask_user", "Ask the user what is meant.", "question")
PLAIN_SET = (CALCULATOR, LOOKUP)
MIXED_SET = (CALCULATOR, LOOKUP, SEND_MESSAGE, ASK_USER)
OTHER_SET = (SEND_MESSAGE, ASK_USER)  # what a gate leaves of the mixed set
KINDS = {"calculator": "compute", "lookup": "lookup", "send_message": "action", "ask_user": "clarify"}


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, str]

    def text(self) -> str:
        """In the Hermes format, as the tool template renders it."""
        body = json.dumps({"name": self.name, "arguments": self.arguments}, ensure_ascii=False)
        return f"<tool_call>\n{body}\n</tool_call>"

    def message(self, identifier: str) -> dict[str, Any]:
        """An assistant's message of this call."""
        function = {"name": self.name, "arguments": json.dumps(self.arguments, ensure_ascii=False)}
        call = {"id": identifier, "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}


@dataclass(frozen=True)
class Fact:
    """`rivals` are the values of other collections."""

    collection: str
    attribute: str
    value: str
    rivals: tuple[str, ...]
    questions: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.collection} {self.attribute}"

    @property
    def call(self) -> Call:
        return Call("lookup", {"key": self.key})


@dataclass(frozen=True)
class Sum:
    size: int
    a: int
    sign: Operator
    b: int

    @property
    def answer(self) -> str:
        return str({"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.sign])

    @property
    def call(self) -> Call:
        return Call("calculator", {"expression": f"{self.a} {self.sign} {self.b}"})

    def asked(self, form: str) -> str:
        return form.format(a=self.a, b=self.b, sign=self.sign, word=WORDS[self.sign])


@dataclass(frozen=True)
class Archive:
    """`trained`, `untrained` and `gaps` are all facts of the archive; `visitors` come with a value of chance each time."""

    trained: tuple[Fact, ...]
    untrained: tuple[Fact, ...]
    gaps: tuple[Fact, ...]
    visitors: tuple[Fact, ...]
    vague: tuple[str, ...]

    @property
    def facts(self) -> tuple[Fact, ...]:
        return self.trained + self.untrained + self.gaps


def read_archive(seed: int) -> Archive:
    """The archive of a seed: who has which value, and which half is trained."""
    content = tomllib.loads(files("trainers").joinpath("data/fernhill.toml").read_text(encoding="utf-8"))
    rng = random.Random(f"{seed}/archive")
    facts: list[Fact] = []
    visitors: list[Fact] = []
    for attribute in content["attributes"]:
        values: list[str] = list(attribute["values"])
        rng.shuffle(values)
        owned = [*zip(content["collections"], values, strict=True)]
        guests = [(visitor, rng.choice(values)) for visitor in content["visitors"]]
        for owners, into in ((owned, facts), (guests, visitors)):
            for collection, value in owners:
                asked, held_out = (
                    tuple(form.format(collection=collection) for form in attribute[key])
                    for key in ("questions", "held_out")
                )
                rivals = tuple(other for other in attribute["values"] if other != value)
                into.append(Fact(collection, attribute["name"], value, rivals, asked, held_out))
    rng.shuffle(facts)
    half, gaps = len(facts) // 2, len(facts) // 4
    return Archive(
        trained=tuple(facts[:half]),
        untrained=tuple(facts[half:-gaps]),
        gaps=tuple(facts[-gaps:]),
        visitors=tuple(visitors),
        vague=tuple(one["vague"] for one in content["attributes"]),
    )


def sums(seed: int, trained: dict[int, int], asked: dict[int, int]) -> tuple[list[Sum], list[Sum]]:
    """So many sums of each size to train, and so many to ask.

    All of size 1 are trained, and those asked are among them: they are few, and to know them is to have learnt them. Of
    the other sizes no sum is in both.
    """
    rng = random.Random(f"{seed}/sums")
    train, ask = _all_smallest(), rng.sample(_all_smallest(), asked.get(1, 0))
    for size in SIZES[1:]:
        fresh: dict[Sum, None] = {}
        while len(fresh) < trained.get(size, 0) + asked.get(size, 0):
            fresh[_drawn(size, rng)] = None
        train += list(fresh)[: trained.get(size, 0)]
        ask += list(fresh)[trained.get(size, 0) :]
    return train, ask


def _all_smallest() -> list[Sum]:
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    return [Sum(1, a, sign, b) for sign in OPERATORS for a, b in pairs if sign != "-" or a >= b]


def _drawn(size: int, rng: random.Random) -> Sum:
    """Size 2: up to two digits, + and -. Size 3: three digits, or two times one. Size 4: four and five digits, or products."""
    sign = rng.choice(OPERATORS if size > 2 else OPERATORS[:2])
    low, high = {2: (10, 99), 3: (100, 999), 4: (1000, 99_999)}[size]
    if sign == "*":
        first, second = ((12, 99), (3, 9)) if size == 3 else ((12, 999), (12, 999))
        return Sum(size, rng.randint(*first), sign, rng.randint(*second))
    a, b = rng.randint(low, high), rng.randint(low if size > 2 else 1, high)
    return Sum(size, max(a, b), sign, min(a, b)) if sign == "-" else Sum(size, a, sign, b)
