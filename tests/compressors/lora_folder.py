"""LoRA folders as PEFT's save_pretrained writes them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_lora(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """`tensors` without PEFT's prefix, such as `model.layers.0.mlp.up_proj.lora_A.weight`."""
    folder.mkdir(parents=True)
    prefixed = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    defaults = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "target_modules": sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors if ".lora_" in name}),
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(defaults | config))
    return folder


def pair(shape: tuple[int, int], rank: int, seed: int, scale: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random A [rank, in] and B [out, rank]."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5
    return a, scale * torch.randn(shape[0], rank, generator=generator)
