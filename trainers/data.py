"""Rows of a recipe, from committed builders or from JSONL files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainers.bench_rows import memory_rows, sum_rows
from trainers.demo_data import captain_rows, fact_rows, json_rows
from trainers.errors import DataError
from trainers.recipe import DataRecipe
from trainers.rows import Row, Split
from trainers.tool_rows import tool_rows

BUILDERS: dict[str, Callable[[int], Split]] = {
    "json": json_rows,
    "captain": captain_rows,
    "facts": fact_rows,
    "tool-world": tool_rows,
    "memory": memory_rows,
    "sums": sum_rows,
}
_OPTIONAL = ("messages", "tools")  # left out of the digest where a row has none


def load_split(recipe: DataRecipe, recipe_folder: Path) -> Split:
    """The rows of a recipe. Raises DataError naming file and line."""
    if recipe.builder is not None:
        return BUILDERS[recipe.builder](recipe.seed)
    split = Split(_read_jsonl(recipe_folder / recipe.train), _read_jsonl(recipe_folder / recipe.held_out))
    shared = {_asked(row) for row in split.train} & {_asked(row) for row in split.held_out}
    if shared:
        raise DataError(f"{recipe.held_out} repeats {len(shared)} prompts of {recipe.train}, first {min(shared)!r}")
    return split


def written(row: Row) -> str:
    """A row as a line of a JSONL file, which is read back as the same row."""
    return json.dumps({key: value for key, value in asdict(row).items() if value}, ensure_ascii=False) + "\n"


def digest(rows: Sequence[Row]) -> str:
    """sha256 over the rows' contents and order."""
    contents = [{key: value for key, value in asdict(row).items() if value or key not in _OPTIONAL} for row in rows]
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def tool_template(recipe: DataRecipe, recipe_folder: Path) -> str:
    """The text of the template that renders chats with tools; "" where the recipe names none. Raises DataError."""
    if not recipe.tool_template:
        return ""
    path = recipe_folder / recipe.tool_template
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the tool template {path}: {error}") from error


def _asked(row: Row) -> str:
    return json.dumps([row.chat, row.tools]) if row.messages or row.tools else row.prompt


def _read_jsonl(path: Path) -> tuple[Row, ...]:
    """One object per line: prompt or messages, completion, and optionally expected, rivals and tools."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number}: expected an object with prompt or messages, and completion ({error})"
            ) from error
    if not rows:
        raise DataError(f"{path} has no rows")
    return tuple(rows)


def _row(value: dict[str, Any]) -> Row:
    messages = tuple(value.get("messages", ()))
    return Row(
        prompt=value["prompt"] if not messages else value.get("prompt") or _question(messages),
        completion=value["completion"],
        expected=value.get("expected", ""),
        rivals=tuple(value.get("rivals", ())),
        messages=messages,
        tools=tuple(value.get("tools", ())),
    )


def _question(messages: Sequence[dict[str, Any]]) -> str:
    """What the user said last."""
    texts: list[str] = [message["content"] for message in messages if message["role"] == "user"]
    return texts[-1]
