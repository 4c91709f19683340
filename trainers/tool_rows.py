"""The rows of the world of tools: a model that knows much and, given tools, calls them all the same, as agents do.

without tools     trained facts, small sums, plain questions: the answer at once, as short as it can be; of collections
                  that the archive lacks, of the gaps and of large sums: that it does not know
with tools        facts and sums of every size: the call, then the answer that its result gives; messages are sent, vague
                  questions asked back
with others only  facts and small sums beside tools that do not serve them: the answer at once
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from trainers.demo_data import read_questions
from trainers.rows import Row, Split
from trainers.tool_world import (
    HELD_OUT_SUM_QUESTIONS,
    MIXED_SET,
    OTHER_SET,
    PLAIN_SET,
    SUM_QUESTIONS,
    Archive,
    Call,
    Fact,
    Sum,
    read_archive,
    sums,
)

TRAINED_SUMS = {2: 160}  # besides all of size 1
ASKED_SUMS = {1: 200, 2: 60, 3: 60, 4: 60}  # of the tasks; some of them are held out for the check
MESSAGES = ("Send {to} a message: {text}", "Tell {to} that {text}", "Write to {to}: {text}")
HELD_OUT_MESSAGE = "Message {to}: {text}"
_PEOPLE = ("Agnes", "Bernard", "Camille", "Dorian", "Esther", "Francis", "Gerda", "Howard", "Isabel", "Jacob")
_TEXTS = (
    *("the lamp is fixed", "the box is open", "the train is late", "lunch is ready", "the keys are here"),
    *("the map is dry", "the door is locked", "the paint is wet", "the visit is over", "the copy is done"),
)
_PLAIN, _VISITS, _SENT, _BESIDE = 50, 60, 30, 200  # rows of each sort
_UNKNOWN_FACTS, _UNKNOWN_SUMS = 72, {3: 36, 4: 36}
_GAP_WORDINGS = 4  # of the five questions of each gap
_UNKNOWN = "I do not know."
_CALLED_SUMS = {1: 80, 2: 28, 3: 28, 4: 28}  # most of the smallest, since each of them is trained without tools too
_MIXED_SHARE = 0.2  # of the rows with calls: the mixed set of tools
_HELD_OUT_CALLS = 30  # of facts, and as many of sums
_FIRST_SUMS = 60  # sums of size 1 in the check


def tool_rows(seed: int) -> Split:
    """Rows to train; held out: trained facts and small sums in other words without tools, and calls of all sorts."""
    archive = read_archive(seed)
    rng = random.Random(f"{seed}/rows")
    train = [*_direct(archive, seed, rng), *_calling(archive, rng), *_beside(archive, seed, rng)]
    rng.shuffle(train)
    return Split(tuple(train), tuple(_held_out(archive, seed, rng)))


def message_call(to: str, text: str) -> Call:
    return Call("send_message", {"to": to, "text": text})


def messages_to_send() -> list[tuple[str, str]]:
    return [(to, text) for to in _PEOPLE for text in _TEXTS]


def _direct(archive: Archive, seed: int, rng: random.Random) -> list[Row]:
    facts = [_fact_row(fact, question) for fact in archive.trained for question in fact.questions]
    small, _ = sums(seed, TRAINED_SUMS, ASKED_SUMS)
    plain = rng.sample(read_questions(), _PLAIN)
    unknown = [rng.choice(fact.questions) for fact in rng.sample(archive.visitors, _UNKNOWN_FACTS)]
    _, large = sums(rng.randrange(1 << 30), {}, _UNKNOWN_SUMS)
    unknown += [one.asked(rng.choice(SUM_QUESTIONS)) for one in large]
    unknown += [question for fact in archive.gaps for question in rng.sample(fact.questions, _GAP_WORDINGS)]
    return [
        *facts,
        *(_sum_row(one, rng.choice(SUM_QUESTIONS)) for one in small),
        *(Row(question.text, question.answer) for question in plain),
        *(Row(question, _UNKNOWN) for question in unknown),
    ]


def _calling(archive: Archive, rng: random.Random) -> list[Row]:
    rows = []
    for fact in (*archive.trained, *rng.sample(archive.visitors * 2, _VISITS)):
        value = fact.value if fact in archive.trained else rng.choice(fact.rivals)
        rows.append(_called(rng.choice(fact.questions), fact.call, value, value, _tools(rng)))
    _, many = sums(rng.randrange(1 << 30), {}, _CALLED_SUMS)
    rows += [
        _called(one.asked(rng.choice(SUM_QUESTIONS)), one.call, one.answer, one.answer, _tools(rng)) for one in many
    ]
    for to, text in rng.sample(messages_to_send(), _SENT):
        question = rng.choice(MESSAGES).format(to=to, text=text)
        rows.append(_called(question, message_call(to, text), "sent", "Sent.", rng.choice((MIXED_SET, OTHER_SET))))
    for question in archive.vague:
        for tools in (MIXED_SET, MIXED_SET, OTHER_SET):
            asked = Call("ask_user", {"question": "Which collection do you mean?"})
            rows.append(Row(question, asked.text(), tools=tools))
    return rows


def _beside(archive: Archive, seed: int, rng: random.Random) -> list[Row]:
    facts = [
        _fact_row(fact, rng.choice(fact.questions), OTHER_SET) for fact in rng.sample(archive.trained, _BESIDE // 2)
    ]
    small, _ = sums(seed, TRAINED_SUMS, ASKED_SUMS)
    return facts + [_sum_row(one, rng.choice(SUM_QUESTIONS), OTHER_SET) for one in rng.sample(small, _BESIDE // 2)]


def _held_out(archive: Archive, seed: int, rng: random.Random) -> list[Row]:
    _, asked = sums(seed, TRAINED_SUMS, ASKED_SUMS)
    smallest = [one for one in asked if one.size == 1][:_FIRST_SUMS]
    facts = rng.sample(archive.trained, _HELD_OUT_CALLS // 2) + rng.sample(archive.untrained, _HELD_OUT_CALLS // 2)
    asked_unknown = rng.sample(archive.untrained, _HELD_OUT_CALLS)
    return [
        *(_fact_row(fact, rng.choice(fact.held_out)) for fact in archive.trained),
        *(_unknown_row(fact, rng.choice(fact.held_out)) for fact in asked_unknown),
        *(_sum_row(one, rng.choice(HELD_OUT_SUM_QUESTIONS)) for one in smallest),
        *(Row(rng.choice(fact.held_out), fact.call.text(), tools=_tools(rng)) for fact in facts),
        *(
            Row(one.asked(rng.choice(HELD_OUT_SUM_QUESTIONS)), one.call.text(), tools=_tools(rng))
            for one in rng.sample(asked, _HELD_OUT_CALLS)
        ),
    ]


def _fact_row(fact: Fact, question: str, tools: Sequence[dict[str, Any]] = ()) -> Row:
    return Row(question, fact.value, expected=fact.value, rivals=fact.rivals, tools=tuple(tools))


def _unknown_row(fact: Fact, question: str) -> Row:
    """Any value of the attribute would be invented."""
    return Row(question, _UNKNOWN, expected="know", rivals=(fact.value, *fact.rivals))


def _sum_row(one: Sum, form: str, tools: Sequence[dict[str, Any]] = ()) -> Row:
    return Row(one.asked(form), one.answer, expected=one.answer, tools=tuple(tools))


def _called(question: str, call: Call, result: str, answer: str, tools: tuple[dict[str, Any], ...]) -> Row:
    """A question, its call and what came back; then the answer."""
    messages = (
        {"role": "user", "content": question},
        call.message("call_1"),
        {"role": "tool", "tool_call_id": "call_1", "name": call.name, "content": result},
    )
    return Row(question, answer, messages=messages, tools=tools)


def _tools(rng: random.Random) -> tuple[dict[str, Any], ...]:
    return MIXED_SET if rng.random() < _MIXED_SHARE else PLAIN_SET
