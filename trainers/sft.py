"""Supervised fine-tuning of full weights, on TRL's SFTTrainer.

    plan      recipe + base fingerprint + data digests, written first; a resumed run must have the same plan
    order     the rows of every step, fixed before the first step (so an interrupted run goes on as if it had not been)
    train     fp32 weights and optimiser, completion-only loss, a checkpoint every `save_every` steps
    write     the Hugging Face folder `model/` and `run.json`

Weights that the recipe does not train stay bit-equal to the base, so that a delta records nothing for them.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from trl import SFTConfig, SFTTrainer

from compressors.base import resolve_base
from compressors.fingerprint import fingerprint
from trainers.checkpoint import write_model
from trainers.collate import SharedPrefixCollator, first_turn
from trainers.data import digest, load_split, tool_template
from trainers.errors import RecipeError, RunError
from trainers.machine import hardware, versions
from trainers.recipe import Recipe, TrainRecipe
from trainers.tokens import TokenRow, tokenize_row

_LOGGED = ("step", "loss", "grad_norm", "learning_rate", "elapsed_s")  # of TRL's log, what run.json keeps
PROJECTION = re.compile(r"\.(q|k|v|o|gate|up|down)_proj\.weight$")


@dataclass(frozen=True)
class Run:
    """A finished fine-tune: the folder of the checkpoint, and what run.json holds."""

    model: Path
    record: dict[str, Any]


def train_sft(recipe: Recipe, recipe_folder: Path, output: Path, base: str | None = None, resume: bool = False) -> Run:
    """Fine-tune as the recipe says and write `output/model` and `output/run.json`.

    `base` overrides the recipe's base. With `resume`, an interrupted run goes on from its last checkpoint, and a finished
    one is returned as it is. Raises RunError when `output` holds another run, or any run without `resume`.
    """
    base_folder = resolve_base(base or recipe.base)
    split = load_split(recipe.data, recipe_folder)
    template = tool_template(recipe.data, recipe_folder)
    plan = {
        "recipe": recipe.model_dump(mode="json", exclude={"description", "check", "compress"}),
        "base_fingerprint": fingerprint(base_folder),
        "data_sha256": {"train": digest(split.train), "held_out": digest(split.held_out)}
        | ({"tool_template": hashlib.sha256(template.encode()).hexdigest()} if template else {}),
    }
    finished = _claim(output, plan, resume)
    if finished is not None:
        return finished
    set_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    rows = [tokenize_row(tokenizer, row, recipe.train.max_length, template) for row in split.train]
    by_prompt = recipe.train.batches == "by-system-prompt"
    groups = [first_turn(row.input_ids, tokenizer.eos_token_id) for row in rows] if by_prompt else None
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    trained = freeze(model, recipe.train.trainable)
    trainer = _TimedTrainer(
        model=model,
        args=_arguments(recipe.train, recipe.seed, output / "checkpoints"),
        data_collator=SharedPrefixCollator(tokenizer.eos_token_id),
        train_dataset=_dataset(rows, step_order(len(rows), recipe.train, recipe.seed, groups)),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=_last_checkpoint(output) if resume else None)
    write_model(model, base_folder, output / "model", recipe.train.save_dtype)
    record = plan | {
        "recipe": recipe.model_dump(mode="json"),
        "base": str(base_folder),
        "rows": {"train": len(split.train), "held_out": len(split.held_out)},
        "trained_parameters": trained,
        "losses": [{key: entry[key] for key in _LOGGED} for entry in trainer.state.log_history if "loss" in entry],
        "wall_s": round(trainer.elapsed_s(), 1),
        "versions": versions(),
        "hardware": hardware(),
    }
    (output / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return Run(output / "model", record)


def freeze(model: PreTrainedModel, trainable: str) -> int:
    """Leave gradients on for the recipe's choice only; returns how many parameters are trained."""
    trained = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable == "all" or PROJECTION.search(name) is not None)
        trained += parameter.numel() if parameter.requires_grad else 0
    if trained == 0:
        raise RecipeError('the base has no q, k, v, o, gate, up or down projections; use trainable = "all"')
    return trained


def step_order(rows: int, train: TrainRecipe, seed: int, groups: Sequence[Hashable] | None = None) -> list[int]:
    """Row numbers for all steps, `batch_size` per step: epoch after epoch, each shuffled anew.

    With `groups`, one for every row, a step's rows are of one group; rows left over at an epoch's end wait for the next.
    """
    rng = random.Random(seed)
    wanted = train.steps * train.batch_size
    order: list[int] = []
    waiting: dict[Hashable, list[int]] = {}
    while len(order) < wanted:
        epoch = rng.sample(range(rows), rows)
        order += epoch if groups is None else _batched(epoch, groups, waiting, train.batch_size, rng)
    return order[:wanted]


def _batched(
    epoch: Sequence[int], groups: Sequence[Hashable], waiting: dict[Hashable, list[int]], size: int, rng: random.Random
) -> list[int]:
    batches = []
    for row in epoch:
        own = waiting.setdefault(groups[row], [])
        own.append(row)
        if len(own) == size:
            batches.append(waiting.pop(groups[row]))
    rng.shuffle(batches)
    return [row for batch in batches for row in batch]


class _TimedTrainer(SFTTrainer):  # type: ignore[misc]  # trl ships no types
    """SFTTrainer whose log carries the training time so far, across interruptions, and which reports to nobody."""

    _started: float = 0.0
    _before_s: float | None = None

    def elapsed_s(self) -> float:
        return (self._before_s or 0.0) + time.perf_counter() - self._started

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._before_s is None:  # the first step of this process; the state is already the checkpoint's
            earlier = [entry["elapsed_s"] for entry in self.state.log_history if "elapsed_s" in entry]
            self._before_s, self._started = max(earlier, default=0.0), time.perf_counter()
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs["elapsed_s"] = round(self.elapsed_s(), 1)
        self._metrics["train"].pop("num_tokens", None)  # counted from the mask, which here is a matrix
        super().log(logs, start_time)

    def _send_telemetry(self) -> None:
        return


def _arguments(train: TrainRecipe, seed: int, folder: Path) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder),
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size,
        train_sampling_strategy="sequential",
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        adam_beta2=train.adam_beta2,
        max_grad_norm=train.max_grad_norm,
        max_length=train.max_length,
        optim="adamw_torch_fused",
        bf16=train.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),  # else bf16 is refused there
        gradient_checkpointing=False,
        save_strategy="steps",
        save_steps=train.save_every,
        save_total_limit=1,
        logging_steps=train.log_every,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=seed,
        data_seed=seed,
    )


def _dataset(rows: Sequence[TokenRow], order: Sequence[int]) -> Dataset:
    return Dataset.from_dict(
        {"input_ids": [rows[i].input_ids for i in order], "labels": [rows[i].labels for i in order]}
    )


def _claim(output: Path, plan: dict[str, Any], resume: bool) -> Run | None:
    """Make `output` this run's folder, or return the finished run that it already is."""
    path = output / "plan.json"
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
        return None
    if not resume:
        raise RunError(f"{output} already holds a run; go on with --resume, or choose another --output")
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored != plan:
        changed = ", ".join(key for key in plan if stored.get(key) != plan[key])
        raise RunError(f"{output} holds another run ({changed} differ); choose another --output")
    record = output / "run.json"
    return Run(output / "model", json.loads(record.read_text(encoding="utf-8"))) if record.exists() else None


def _last_checkpoint(output: Path) -> str | None:
    folders = (output / "checkpoints").glob("checkpoint-*")
    whole = [folder for folder in folders if (folder / "trainer_state.json").exists()]  # written last
    return str(max(whole, key=lambda folder: int(folder.name.split("-")[1]))) if whole else None
