"""Tasks of the world of tools for the tool gate: what to label a policy on, and what to judge it on.

More than half of the questions are of what the model knows, as in SMART's pilot (Llama-3.1-8B on GSM8K): trained facts, and
two thirds as many that are not, are asked in all their held-out words, and half of the sums are the smallest.

Facts are split, not their questions: all that is asked of a fact is in one of the two files. Sums are in one of them by
themselves. The order of a file is drawn too, so that its first lines are a sample of it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.tool_rows import ASKED_SUMS, HELD_OUT_MESSAGE, TRAINED_SUMS, message_call, messages_to_send
from trainers.tool_world import HELD_OUT_SUM_QUESTIONS, KINDS, MIXED_SET, PLAIN_SET, Archive, Fact, read_archive, sums

_MIXED_SHARE = 0.25  # of the tasks: the mixed set of tools
_MESSAGES = 40
_EXECUTORS = {"calculator": "calculator", "lookup": "lookup"}


@dataclass(frozen=True)
class Written:
    """How many tasks each file holds."""

    label: int
    evaluation: int


def write_tasks(folder: Path, seed: int, eval_share: float) -> Written:
    """`label.jsonl`, `eval.jsonl`, both together as `tasks.jsonl`, and `facts.json` for the executor `lookup`."""
    archive = read_archive(seed)
    label, evaluation = tool_tasks(archive, seed, eval_share)
    folder.mkdir(parents=True, exist_ok=True)
    for name, tasks in (("label", label), ("eval", evaluation), ("tasks", label + evaluation)):
        lines = "".join(json.dumps(task, ensure_ascii=False) + "\n" for task in tasks)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    facts = {fact.key: fact.value for fact in archive.facts}
    (folder / "facts.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return Written(len(label), len(evaluation))


def tool_tasks(archive: Archive, seed: int, eval_share: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Tasks to label and tasks to evaluate on."""
    rng = random.Random(f"{seed}/tasks")
    _, asked = sums(seed, TRAINED_SUMS, ASKED_SUMS)
    sources: list[list[dict[str, Any]]] = [
        *(_of_fact(fact, "trained") for fact in archive.trained),
        *(_of_fact(fact, "untrained") for fact in archive.untrained),
        *(
            [_task(f"sum-{one.size}-{number}", one.asked(rng.choice(HELD_OUT_SUM_QUESTIONS)), (one.answer,))]
            for number, one in enumerate(asked)
        ),
        *([_of_message(to, text)] for to, text in rng.sample(messages_to_send(), _MESSAGES)),
    ]
    rng.shuffle(sources)
    cut = round(len(sources) * eval_share)
    evaluation, label = (
        [_equipped(task, rng) for tasks in part for task in tasks] for part in (sources[:cut], sources[cut:])
    )
    rng.shuffle(label)
    rng.shuffle(evaluation)
    return label, evaluation


def _of_fact(fact: Fact, half: str) -> list[dict[str, Any]]:
    name = f"{half}-{fact.key.lower().replace(' ', '-')}"
    return [_task(f"{name}-{number}", question, (fact.value,)) for number, question in enumerate(fact.held_out)]


def _of_message(to: str, text: str) -> dict[str, Any]:
    call = message_call(to, text)
    results = {call.name: {json.dumps(call.arguments): "sent"}}
    question = HELD_OUT_MESSAGE.format(to=to, text=text)
    return _task(f"message-{to}-{text}".lower().replace(" ", "-"), question, ("Sent.",)) | {"tool_results": results}


def _task(identifier: str, question: str, gold: Sequence[str]) -> dict[str, Any]:
    return {"id": identifier, "question": question, "gold": list(gold)}


def _equipped(task: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The task with its tools; messages can only be sent with the mixed set."""
    tools = MIXED_SET if "tool_results" in task or rng.random() < _MIXED_SHARE else PLAIN_SET
    names = [tool["function"]["name"] for tool in tools]
    return {**task, "tools": list(tools), "tool_kinds": {name: KINDS[name] for name in names}, "executors": _EXECUTORS}
