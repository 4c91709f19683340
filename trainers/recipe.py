"""The recipe of one fine-tune: a TOML file, read once, unknown keys refused.

Relative paths in a recipe are relative to the recipe's own folder.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainers.errors import RecipeError

RecipeT = TypeVar("RecipeT", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataRecipe(_Section):
    """Where the rows come from: `builder` (made by committed code), or `train` and `held_out` (JSONL files).

    `tool_template` is the file of the chat template that the server renders chats with tools by.
    """

    builder: Literal["json", "captain", "facts", "tool-world", "memory", "sums"] | None = None
    seed: int = 0
    train: str = ""
    held_out: str = ""
    tool_template: str = ""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.builder is None) != bool(self.train and self.held_out) or (
            self.builder and (self.train or self.held_out)
        ):
            raise ValueError("give either builder, or both train and held_out")
        return self


class TrainRecipe(_Section):
    """The optimisation. Times and sizes: steps are optimiser steps, lengths are tokens."""

    steps: Annotated[int, Field(gt=0)]
    batch_size: Annotated[int, Field(gt=0)]
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_length: Annotated[int, Field(gt=0)] = 512
    batches: Literal["mixed", "by-system-prompt"] = "mixed"  # by-system-prompt: a long one is computed once a step
    trainable: Literal["projections", "all"] = "projections"
    precision: Literal["fp32", "bf16"] = "fp32"  # of the matrix products; weights and optimiser are always fp32
    save_every: Annotated[int, Field(gt=0)] = 50
    log_every: Annotated[int, Field(gt=0)] = 10
    save_dtype: Literal["fp32", "bf16"] = "fp32"  # bf16 rounds W, and so the delta; fp32 keeps it


class CheckRecipe(_Section):
    """How success is judged, on the held-out rows, from greedy answers."""

    kind: Literal["strict-json", "captain", "known-answer", "tool-use"]
    max_new_tokens: Annotated[int, Field(gt=0)] = 64
    batch_size: Annotated[int, Field(gt=0)] = 16


class CompressRecipe(_Section):
    """ImPart's settings for the committed artifact (compressors/impart.py)."""

    ratio: Annotated[float, Field(ge=1)] = 32.0
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.6
    c: Annotated[float, Field(ge=0)] = 1.0
    rule: Literal["exact", "released"] = "exact"
    value_dtype: Literal["fp16", "bf16", "int8"] = "int8"
    seed: Annotated[int, Field(ge=0)] = 0


class Recipe(_Section):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    description: str
    base: str = "default"
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataRecipe
    train: TrainRecipe
    check: CheckRecipe | None = None
    compress: CompressRecipe = CompressRecipe()


def load_recipe(path: Path) -> Recipe:
    """Read the recipe of a fine-tune. Raises RecipeError naming the key and, for an unknown key, the nearest known one."""
    return read_recipe(path, Recipe)


def read_recipe(path: Path, model: type[RecipeT]) -> RecipeT:
    """Read a TOML file as `model`. Raises RecipeError naming the key and, for an unknown key, the nearest known one."""
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from error
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = "; ".join(
            _sentence(model, detail["loc"], detail["type"], detail["msg"]) for detail in error.errors()
        )
        raise RecipeError(f"{path}: {problems}") from error


def _sentence(model: type[BaseModel], location: tuple[int | str, ...], kind: str, message: str) -> str:
    key = ".".join(str(part) for part in location)
    if kind != "extra_forbidden":
        return f"{key}: {message}" if key else message
    known = _known_keys(model, location[:-1])
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else f"; known keys are {', '.join(known)}")


def _known_keys(model: type[BaseModel], section: tuple[int | str, ...]) -> list[str]:
    for name in section:
        inner = model.model_fields[str(name)].annotation
        assert inner is not None
        model = next(
            kind for kind in (inner, *get_args(inner)) if isinstance(kind, type) and issubclass(kind, BaseModel)
        )
    return list(model.model_fields)
