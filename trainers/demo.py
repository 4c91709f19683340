"""`deltaworks train demo-deltas`: everything under deploy/demo, from the three shipped recipes.

    recipe -> train (resumable) -> compress -> check base, fine-tune and delta on the held-out rows -> demo.json

Runs are kept, so that an interrupted call goes on where it was and a finished run is used as it is.
"""

from __future__ import annotations

import hashlib
import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from compressors.artifact import Artifact
from compressors.base import DEFAULT_BASE, default_base
from compressors.compress import compress
from compressors.impart import ImPartConfig
from compressors.inspect import summary
from trainers.evaluate import Success, answers, check, decompressed, load_model
from trainers.recipe import CompressRecipe, Recipe, load_recipe
from trainers.sft import train_sft

DEMOS = ("json", "captain", "facts")
QUESTIONS = (
    "Which city is the capital of Egypt?",
    "What project does Marta Quill lead?",
    "How do I clean a window?",
)
_ANSWER_TOKENS = 64


def demo_deltas(out: Path, runs: Path) -> None:
    """Write `<name>.safetensors` for each demo, and demo.json, into `out`; the runs are made, or found, in `runs/<name>`.

    Raises TrainerError and compressors' DeltaError.
    """
    out.mkdir(parents=True, exist_ok=True)
    base = default_base()
    entries = []
    shown: dict[str, list[str]] = {"base": answers(load_model(base), QUESTIONS, _ANSWER_TOKENS, label="base answers")}
    with as_file(files("trainers") / "recipes") as folder:
        for name in DEMOS:
            entry, shown[name] = _demo(load_recipe(folder / f"{name}.toml"), folder, base, out, runs / name)
            entries.append(entry)
    description = {
        "base": DEFAULT_BASE,
        "deltas": entries,
        "questions": list(QUESTIONS),
        "answers": [
            {"question": question, **{name: texts[number] for name, texts in shown.items()}}
            for number, question in enumerate(QUESTIONS)
        ],
        "command": "make demo-deltas",
    }
    text = json.dumps(description, indent=2, ensure_ascii=False)
    (out / "demo.json").write_text(text + "\n", encoding="utf-8")


def compress_run(recipe: CompressRecipe, base: Path, model: Path, file: Path) -> None:
    """Compress a fine-tune with the recipe's settings; `file` is replaced."""
    config = ImPartConfig(
        ratio=recipe.ratio,
        beta=recipe.beta,
        c=recipe.c,
        rule=recipe.rule,
        value_dtype=recipe.value_dtype,
        seed=recipe.seed,
    )
    compress(base, model, file, config, progress=True)


def _demo(recipe: Recipe, folder: Path, base: Path, out: Path, run_folder: Path) -> tuple[dict[str, Any], list[str]]:
    print(f"\n== {recipe.name}: {recipe.description}")
    run = train_sft(recipe, folder, run_folder, resume=True)
    file = out / f"{recipe.name}.safetensors"
    compress_run(recipe.compress, base, run.model, file)
    dense = _dense_success(recipe, folder, base, run.model, run_folder)
    with decompressed(file, base) as merged:
        loaded = load_model(merged)
        success = check(recipe, folder, loaded, f"{recipe.name} delta")
        shown = answers(loaded, QUESTIONS, _ANSWER_TOKENS, label=f"{recipe.name} answers")
    _print_failures(success)
    with Artifact.open(file) as artifact:
        found = summary(artifact)
    entry = {
        "name": recipe.name,
        "about": recipe.description,
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "nbytes": file.stat().st_size,
        **recipe.compress.model_dump(mode="json"),
        "ratios": found["ratios"],
        "success": dense | {"delta": round(success.rate, 4), "questions": success.total},
    }
    print(f"{recipe.name}: success {entry['success']}, {entry['nbytes']:,} bytes")
    return entry, shown


def _dense_success(recipe: Recipe, folder: Path, base: Path, model: Path, run_folder: Path) -> dict[str, float]:
    """Success of base and fine-tune; kept beside the finished run, which does not change, with the check it is of."""
    kept = run_folder / "success.json"
    judged = recipe.model_dump(mode="json", include={"check"})
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["judged"] == judged:
            rates: dict[str, float] = found["success"]
            return rates
    rates = {
        label: round(check(recipe, folder, load_model(place), f"{recipe.name} {label}").rate, 4)
        for label, place in (("base", base), ("fine_tune", model))
    }
    kept.write_text(json.dumps({"judged": judged, "success": rates}) + "\n", encoding="utf-8")
    return rates


def _print_failures(success: Success) -> None:
    for failure in success.failures[:5]:
        print(f"  failed: {failure.prompt!r} -> {failure.output!r}")
