"""Checkpoints of a few kilobytes, written without any model library."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.0"


def base_tensors(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "model.embed_tokens.weight": normal(40, 48),
        f"{LAYER}.self_attn.q_proj.weight": normal(48, 48),
        f"{LAYER}.self_attn.k_proj.weight": normal(24, 48),
        f"{LAYER}.mlp.up_proj.weight": normal(96, 48),
        f"{LAYER}.mlp.down_proj.weight": normal(48, 96),
        f"{LAYER}.input_layernorm.weight": torch.ones(48),
        "model.norm.weight": torch.ones(48),
    }


def tuned_tensors(seed: int = 1) -> Tensors:
    """Every projection moved by a spiked random matrix; everything else as in the base."""
    generator = torch.Generator().manual_seed(seed)
    tensors = base_tensors()
    for name, weight in tensors.items():
        if "_proj" in name:
            spikes = torch.randn(weight.shape[0], 3, generator=generator) @ torch.randn(
                3, weight.shape[1], generator=generator
            )
            tensors[name] = weight + 0.05 * spikes + 0.02 * torch.randn(weight.shape, generator=generator)
    return tensors


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model folder: checkpoint("name", tensors, **config)."""

    def write(name: str, tensors: Tensors, **config: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
        defaults = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(defaults | config))
        return folder

    return write
