"""`deltaworks train sae`: record the streams of a model, train one SAE per layer, measure and save them.

A run's folder: run.json (all that is needed to repeat it), activations/, checkpoints/, layer-<L>/ (SAELens v6 folders that
sae-lens loads, and maxima.safetensors with each latent's largest activation), report.json, report.md, report.png. Parts that are
there are kept, so a run that was interrupted goes on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressors.base import resolve_base
from compressors.fingerprint import fingerprint
from steering.activations import load_model, load_tokenizer
from steering.formats import save_saelens
from steering.sae import SAE, Hook
from trainers.errors import RunError
from trainers.machine import hardware, versions
from trainers.sae_harvest import harvest, write_json
from trainers.sae_loop import Trained, train_layer
from trainers.sae_recipe import SAERecipe, SAETrainRecipe
from trainers.sae_report import LayerReport, as_json, measure, plot, table
from trainers.sae_text import sequences

_LOSS_SEQUENCES = 16  # kept out of the recording: the loss with a reconstruction spliced in is measured on them


@dataclass(frozen=True)
class SAERun:
    """What a run left: one folder per layer, and the reports."""

    folders: dict[int, Path]
    reports: list[LayerReport]


def train_saes(recipe: SAERecipe, folder: Path, output: Path, base: str | None, resume: bool) -> SAERun:
    """Run a recipe from `folder`. Raises RunError when `output` holds another run, or one and `resume` is not asked for."""
    model_folder = resolve_base(base or recipe.base)
    record: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"),
        "base_fingerprint": fingerprint(model_folder),
        "versions": versions(),
        "hardware": hardware(),
    }
    _claim(output, record, resume)
    started = time.monotonic()
    wanted = recipe.data.model_copy(update={"tokens": recipe.data.tokens + _LOSS_SEQUENCES * (recipe.data.context - 1)})
    ids = sequences(wanted, folder, load_tokenizer(model_folder), recipe.seed)
    recorded_ids, loss_ids = ids[:-_LOSS_SEQUENCES], ids[-_LOSS_SEQUENCES:]
    model: Callable[[], Any] = cache(lambda: load_model(model_folder))
    key = _key(record, ids)
    recorded = harvest(model, recorded_ids, recipe.layers, recipe.data, output / "activations", key, recipe.seed)
    (output / "checkpoints").mkdir(exist_ok=True)
    trained, reports, rates, folders = {}, [], {}, {}
    for layer in recipe.layers:
        checkpoint = output / "checkpoints" / f"layer-{layer}.safetensors"
        found = trained[layer] = train_layer(recorded, layer, recipe.train, recipe.seed + layer, checkpoint)
        held_out = np.asarray(recorded.layer(layer)[: recorded.held_out])
        sae = to_sae(found, recipe.train, held_out, layer, model_folder.name, record["base_fingerprint"])
        measured = measure(layer, sae, held_out, found, model(), loss_ids)
        reports.append(measured.report)
        rates[layer] = measured.rates
        folders[layer] = output / f"layer-{layer}"
        save_saelens(replace(sae, maxima=measured.maxima), folders[layer])
    record["wall_s"] = round(time.monotonic() - started, 1)
    write_json(output / "run.json", record)
    write_json(output / "report.json", as_json(reports))
    (output / "report.md").write_text(table(reports) + "\n", encoding="utf-8")
    plot(trained, rates, output / "report.png")
    return SAERun(folders, reports)


def to_sae(
    found: Trained, recipe: SAETrainRecipe, held_out: Any, layer: int, model_name: str, base_fingerprint: str
) -> SAE:
    """The trained weights as an SAE of unscaled streams: the scale goes into the encoder and out of the decoder."""
    w = found.weights
    threshold = None
    if recipe.architecture == "batchtopk":
        level = _threshold(found, recipe.k, held_out)
        threshold = torch.full_like(w.b_enc, level)
    return SAE(
        w_enc=(w.enc.T * found.scale).contiguous(),
        b_enc=w.b_enc.clone(),
        w_dec=w.dec / found.scale,
        b_dec=w.b_dec / found.scale,
        architecture="topk" if threshold is None else "jumprelu",
        threshold=threshold,
        k=recipe.k if threshold is None else None,
        subtract_b_dec=True,
        hook=Hook(layer),
        model_name=model_name,
        metadata={"base_fingerprint": base_fingerprint, "trained_k": recipe.k, "trained_steps": found.steps},
    )


def _threshold(found: Trained, k: int, held_out: Any) -> float:
    """The level above which held-out rows [N, d] keep k latents on average: BatchTopK's threshold at inference."""
    w = found.weights
    x = torch.from_numpy(held_out.astype(np.float32)) * found.scale
    positive = torch.cat([_positive(w.enc, w.b_enc, rows - w.b_dec) for rows in torch.split(x, 512)])
    kept = min(k * len(x), len(positive))
    return float(torch.topk(positive, kept, sorted=False).values.min()) * (1 - 1e-6)


def _positive(enc: torch.Tensor, b_enc: torch.Tensor, centred: torch.Tensor) -> torch.Tensor:
    pre = torch.addmm(b_enc, centred, enc.T)
    return pre[pre > 0]


def _claim(output: Path, record: dict[str, Any], resume: bool) -> None:
    run = output / "run.json"
    if run.exists():
        found = json.loads(run.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in ("recipe", "base_fingerprint")} != {
            key: record[key] for key in ("recipe", "base_fingerprint")
        }:
            raise RunError(f"{output} holds a run of another recipe or base; choose another --output")
        if not resume:
            raise RunError(f"{output} holds a run of this recipe; go on with --resume, or choose another --output")
        return
    output.mkdir(parents=True, exist_ok=True)
    write_json(run, record)


def _key(record: dict[str, Any], ids: torch.Tensor) -> str:
    """Identity of a recording: the base, the layers and data of the recipe, and the very tokens."""
    recipe = record["recipe"]
    text = json.dumps([record["base_fingerprint"], recipe["layers"], recipe["data"], recipe["seed"]])
    return hashlib.sha256(text.encode() + ids.numpy().tobytes()).hexdigest()
