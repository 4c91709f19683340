"""The prompt format of the SpARE authors' code, its demonstrations, the split into pool and test groups.

A prompt is a run of blocks `context: ..\\nquestion: ..\\nanswer: ..\\n\\n` (demonstrations) and, last, a block without its answer,
so that the last prompt token is the colon after `answer`. Demonstration styles name what a demonstration shows and how it
answers: `dss` the contradicting document and its answer, `dso` the contradicting document and the true answer, `doo` the true
document and the true answer.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from steering.facts import Fact
from steering.matching import exact_match

STYLES = ("dss", "dso", "doo")
CLOSED_BOOK_SHOTS = 32
SPLIT_SEED = 42
_OPEN = "context: {context}\nquestion: {question}\nanswer:"
_CLOSED = "question: {question}\nanswer:"
_ANSWERED = "{block} {answer}\n\n"


@dataclass(frozen=True)
class Split:
    """Groups of facts: the pool (demonstrations, data to fit on) and the rest, in the order they were drawn."""

    pool: tuple[str, ...]
    test: tuple[str, ...]


def template_sha256() -> str:
    """Names the prompt format in a profile: 64 hex digits."""
    return hashlib.sha256((_OPEN + _ANSWERED).encode()).hexdigest()


def open_block(item: Fact, context: str, answer: str | None = None) -> str:
    """A question with a document; `context` is "org" or "sub". Without an answer it ends at the colon."""
    document = item.org_context if context == "org" else item.sub_context
    return _answered(_OPEN.format(context=document, question=item.question), answer)


def closed_block(item: Fact, answer: str | None = None) -> str:
    """A question without a document."""
    return _answered(_CLOSED.format(question=item.question), answer)


def demonstration(item: Fact, style: str) -> str:
    """A solved block in one of STYLES."""
    context = "org" if style[1] == "o" else "sub"
    return open_block(item, context, (item.org_answers if style[2] == "o" else item.sub_answers)[0])


def open_prompt(demonstrations: Sequence[Fact], style: str, item: Fact, context: str = "sub") -> str:
    return "".join(demonstration(one, style) for one in demonstrations) + open_block(item, context)


def closed_prompt(demonstrations: Sequence[Fact], item: Fact) -> str:
    return "".join(closed_block(one, one.org_answers[0]) for one in demonstrations) + closed_block(item)


def grouped(items: Sequence[Fact]) -> dict[str, list[Fact]]:
    """Items by group, groups in order of their first item."""
    groups: dict[str, list[Fact]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    return groups


def by_category(items: Sequence[Fact], apart: bool) -> dict[str, list[int]]:
    """Indices of the items by category, in order; all of them under "" unless they are to be kept `apart`."""
    found: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        found.setdefault(item.category if apart else "", []).append(index)
    return found


def asked_after(
    first: Sequence[Fact], second: Sequence[Fact], items: Sequence[Fact], rows: Sequence[int]
) -> Iterator[tuple[Sequence[Fact], list[int]]]:
    """(demonstrations, rows of the items asked after them): the first ones, or the second for items whose group is in the first, so
    that none sees itself. Parts without a row are left out."""
    shown = {fact.group for fact in first}
    for demonstrations, inside in ((first, False), (second, True)):
        if found := [row for row in rows if (items[row].group in shown) is inside]:
            yield demonstrations, found


def sample_demonstrations(
    groups: dict[str, list[Fact]], count: int, exclude: str | None, rng: random.Random, category: str = ""
) -> list[Fact]:
    """`count` items of different groups, none of the group `exclude`.

    With a `category` they are of it, as far as it goes round; others stand before them then. Solved questions of the same kind are
    what makes a model follow their example: questions of all kinds leave a small one undecided.
    """
    names = [name for name in groups if name != exclude]
    kin = [name for name in names if category and groups[name][0].category == category]
    rest = [name for name in names if not category or groups[name][0].category != category]
    chosen = rng.sample(kin, min(count, len(kin)))
    others = rng.sample(rest, count - len(chosen))
    return [rng.choice(groups[name]) for name in (*others, *chosen)]


def split_groups(memorised: Sequence[str], pool: int, seed: int = SPLIT_SEED) -> Split:
    """Shuffle the groups that hold a memorised item; the first `pool` are the pool, the rest is held out.

    `memorised` is taken as a set in sorted order, so that the split does not hang on how the items were read.
    """
    names = sorted(set(memorised))
    random.Random(seed).shuffle(names)
    return Split(tuple(names[:pool]), tuple(names[pool:]))


def label(answer: str, item: Fact) -> int | None:
    """1 for the document's answer, 0 for the memorised one, None for neither. The two sets of answers are disjoint."""
    if exact_match(answer, item.sub_answers):
        return 1
    return 0 if exact_match(answer, item.org_answers) else None


def qa_texts(items: Sequence[Fact], seed: int) -> Iterator[str]:
    """Complete prompts with their answers, without end: open-book ones of every style and closed-book ones.

    As text to train SAEs on: they are read where prompts of this format end. Three of four show demonstrations of the item's own
    category. Needs items of at least six groups.
    """
    rng = random.Random(seed)
    groups = grouped(items)
    names = list(groups)
    while True:
        rng.shuffle(names)
        for name in names:
            item = rng.choice(groups[name])
            kind = item.category if rng.random() < 0.75 else ""
            if rng.random() < 0.25:
                shown = sample_demonstrations(groups, 5, name, rng, kind)
                yield closed_prompt(shown, item) + f" {item.org_answers[0]}\n\n"
                continue
            style = rng.choice(STYLES)
            shown = sample_demonstrations(groups, rng.choice((3, 4, 5)), name, rng, kind)
            yield "".join(demonstration(one, style) for one in shown) + demonstration(item, style)


def _answered(block: str, answer: str | None) -> str:
    return block if answer is None else _ANSWERED.format(block=block, answer=answer)
