"""Success of a model on a recipe's held-out rows: greedy answers by plain transformers, fp32, judged by the recipe's check.

A delta is judged as the model that it decompresses to, so nothing of the serving path is between the file and the figure.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from compressors.decompress import decompress
from trainers.checks import CHECKS
from trainers.data import load_split, tool_template
from trainers.errors import RecipeError
from trainers.recipe import CheckRecipe, Recipe
from trainers.rows import Row
from trainers.tokens import prompt_ids


@dataclass(frozen=True)
class Failure:
    prompt: str
    output: str


@dataclass(frozen=True)
class Success:
    """How many of the held-out rows were answered as the check wants, and those that were not."""

    total: int
    failures: tuple[Failure, ...]

    @property
    def rate(self) -> float:
        """Share of successes, 0 to 1."""
        return 1 - len(self.failures) / self.total


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in fp32 with its tokenizer."""

    model: Any
    tokenizer: Any


def load_model(folder: Path) -> LoadedModel:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return LoadedModel(model, tokenizer)


@contextmanager
def decompressed(delta: Path, base: Path) -> Iterator[Path]:
    """The model folder that base + delta stand for, in fp32, gone afterwards. Raises compressors' DeltaError."""
    with tempfile.TemporaryDirectory(prefix="deltaworks-check-") as folder:
        merged = Path(folder) / "merged"
        decompress(delta, base, merged, dtype="fp32")
        yield merged


def check(recipe: Recipe, recipe_folder: Path, loaded: LoadedModel, label: str = "checking") -> Success:
    """Success on the recipe's held-out rows. Raises RecipeError when the recipe has no check."""
    if recipe.check is None:
        raise RecipeError(f"the recipe {recipe.name} has no [check] section")
    rows = load_split(recipe.data, recipe_folder).held_out
    template = tool_template(recipe.data, recipe_folder)
    prompts = [prompt_ids(loaded.tokenizer, row, template) for row in rows]
    outputs = _continued(loaded, prompts, recipe.check.max_new_tokens, recipe.check.batch_size, label)
    return judge(recipe.check, rows, outputs)


def judge(recipe: CheckRecipe, rows: Sequence[Row], outputs: Sequence[str]) -> Success:
    accepted = CHECKS[recipe.kind]
    pairs = zip(rows, outputs, strict=True)
    return Success(len(rows), tuple(Failure(row.prompt, text) for row, text in pairs if not accepted(row, text)))


def answers(
    loaded: LoadedModel, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 16, label: str = "answering"
) -> list[str]:
    """Greedy answers, each to its prompt alone as a single user message, without the end token."""
    ids = [prompt_ids(loaded.tokenizer, Row(prompt, "")) for prompt in prompts]
    return _continued(loaded, ids, max_new_tokens, batch_size, label)


@torch.inference_mode()
def _continued(
    loaded: LoadedModel, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int, label: str
) -> list[str]:
    tokenizer = loaded.tokenizer
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    texts: list[str] = []
    with tqdm(total=len(prompts), desc=label, unit="answer") as bar:
        for start in range(0, len(prompts), batch_size):
            ids = list(prompts[start : start + batch_size])
            batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(loaded.model.device)
            output = loaded.model.generate(**batch, generation_config=config)
            new = output[:, batch["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
            bar.update(len(ids))
    return texts
