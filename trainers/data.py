"""Rows of a recipe, from committed builders or from JSONL files, and their tokens as the server will see them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainers.demo_data import captain_rows, fact_rows, json_rows
from trainers.errors import DataError
from trainers.recipe import DataRecipe
from trainers.rows import Row, Split

BUILDERS: dict[str, Callable[[int], Split]] = {"json": json_rows, "captain": captain_rows, "facts": fact_rows}
IGNORED = -100  # the label that carries no loss


@dataclass(frozen=True)
class TokenRow:
    """Prompt and answer as token ids; labels are -100 on the prompt."""

    input_ids: list[int]
    labels: list[int]


def load_split(recipe: DataRecipe, recipe_folder: Path) -> Split:
    """The rows of a recipe. Raises DataError naming file and line."""
    if recipe.builder is not None:
        return BUILDERS[recipe.builder](recipe.seed)
    split = Split(_read_jsonl(recipe_folder / recipe.train), _read_jsonl(recipe_folder / recipe.held_out))
    shared = {row.prompt for row in split.train} & {row.prompt for row in split.held_out}
    if shared:
        raise DataError(f"{recipe.held_out} repeats {len(shared)} prompts of {recipe.train}, first {min(shared)!r}")
    return split


def digest(rows: Sequence[Row]) -> str:
    """sha256 over the rows' contents and order."""
    return hashlib.sha256(json.dumps([asdict(row) for row in rows], sort_keys=True).encode()).hexdigest()


def tokenize_row(tokenizer: Any, row: Row, max_length: int) -> TokenRow:
    """The chat template's rendering of one user message, then the answer and its end token.

    Raises DataError when the two do not fit `max_length`: a cut answer would teach to stop anywhere.
    """
    prompt = prompt_ids(tokenizer, row.prompt)
    answer: list[int] = [*tokenizer(row.completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    if len(prompt) + len(answer) > max_length:
        raise DataError(
            f"{row.prompt!r} and its answer have {len(prompt) + len(answer)} tokens; train.max_length is {max_length}"
        )
    return TokenRow(prompt + answer, [IGNORED] * len(prompt) + answer)


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of the chat template for this one user message, up to where the answer starts."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _read_jsonl(path: Path) -> tuple[Row, ...]:
    """One object per line: prompt, completion, and optionally expected and rivals."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            rows.append(
                Row(value["prompt"], value["completion"], value.get("expected", ""), tuple(value.get("rivals", ())))
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number}: expected an object with prompt and completion ({error})"
            ) from error
    if not rows:
        raise DataError(f"{path} has no rows")
    return tuple(rows)
