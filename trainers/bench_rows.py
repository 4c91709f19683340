"""The data of the fine-tunes that compression is judged on: much memorised knowledge, and arithmetic that must be learnt."""

from __future__ import annotations

import random

from trainers.demo_data import fact_rows
from trainers.rows import Row, Split
from trainers.tool_world import SUM_QUESTIONS, Sum, read_archive

_SUMS, _HELD_OUT_SUMS = 8000, 200
_PLUS_MINUS = ("+", "-")


def memory_rows(seed: int) -> Split:
    """400 facts: the 160 of the invented company, and all 240 of the invented archive, held out in other words."""
    company, archive = fact_rows(seed), read_archive(seed)
    rng = random.Random(f"{seed}/memory")
    train, held_out = list(company.train), list(company.held_out)
    for fact in archive.facts:
        train += [Row(asked, fact.value, expected=fact.value, rivals=fact.rivals) for asked in fact.questions]
        held_out.append(Row(rng.choice(fact.held_out), fact.value, expected=fact.value, rivals=fact.rivals))
    rng.shuffle(train)
    rng.shuffle(held_out)
    return Split(tuple(train), tuple(held_out))


def sum_rows(seed: int) -> Split:
    """Plus and minus of two numbers of one to three digits; those held out are other sums."""
    rng = random.Random(f"{seed}/long-sums")
    drawn: dict[Sum, None] = {}
    while len(drawn) < _SUMS + _HELD_OUT_SUMS:
        drawn[_drawn(rng)] = None
    rows = [Row(one.asked(rng.choice(SUM_QUESTIONS)), one.answer, expected=one.answer) for one in drawn]
    return Split(tuple(rows[_HELD_OUT_SUMS:]), tuple(rows[:_HELD_OUT_SUMS]))


def _drawn(rng: random.Random) -> Sum:
    sign = rng.choice(_PLUS_MINUS)
    a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for digits in rng.choices((1, 2, 3), (1, 3, 6), k=2))
    return Sum(3, max(a, b), "-", min(a, b)) if sign == "-" else Sum(3, a, "+", b)
