"""Writing a fine-tune as a Hugging Face model folder that differs from its base in the weights only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".gguf"}


def write_model(model: PreTrainedModel, base_folder: Path, folder: Path, dtype: str) -> None:
    """Write `folder` with the model's weights in `dtype` ("fp32" or "bf16") and every other file copied from the base.

    A tied output head is left out, as in the base. The folder appears whole or not at all.
    """
    staging = folder.with_name(folder.name + ".writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for file in base_folder.iterdir():
        if file.is_file() and file.suffix not in _WEIGHT_SUFFIXES and not file.name.endswith(".index.json"):
            shutil.copy(file, staging / file.name)
    config = json.loads((staging / "config.json").read_text(encoding="utf-8"))
    config.pop("dtype", None)
    config["torch_dtype"] = str(_DTYPES[dtype]).removeprefix("torch.")
    (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(_state(model, _DTYPES[dtype]), staging / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def _state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Parameters by name; of two names for one tensor, `named_parameters` keeps the first, which is the embedding."""
    return {name: value.detach().to(dtype).contiguous().cpu() for name, value in model.named_parameters()}
