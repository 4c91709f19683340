"""Tasks to label rows, appended as they are done; rows that are there already are kept, so an interrupted run goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from steering.errors import LabelError
from steering.gate.labels import read_labels, row_line
from steering.gate.rollouts import Asker, Asking
from steering.gate.tasks import Task


def done_ids(path: Path, asking: Asking) -> set[str]:
    """Ids of the rows of a file. A last line that was cut off in writing is removed.

    Raises LabelError where its rows were asked in another way, or are of another model.
    """
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    if not whole.strip():
        return set()
    rows = read_labels(path).rows
    for row in rows:
        counts = (len(row.answers_without), len(row.m))
        if row.probes != asking.probes or row.model.name != asking.model or counts != asking.counts:
            raise LabelError(f"{path} holds rows of other settings ({row.id!r}); write to another file")
    return {row.id for row in rows}


async def label(tasks: Sequence[Task], asker: Asker, out: Path, concurrency: int, on_row: Callable[[], object]) -> None:
    """Append a row per task, in the order in which they are finished. Raises EndpointError; finished rows stay."""
    waiting = list(reversed(tasks))

    async def work() -> None:
        while waiting:
            row = await asker.label(waiting.pop())
            with out.open("ab") as file:
                file.write(row_line(row))
            on_row()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(tasks))):
                group.create_task(work())
    except ExceptionGroup as errors:  # the first one stopped the others
        raise errors.exceptions[0] from None
