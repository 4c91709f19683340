"""Checkpoints of a few kilobytes; those without a tokenizer are written without any model library."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

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


def drawn(shape: tuple[int, int], seed: int, size: float = 0.02) -> torch.Tensor:
    """A matrix of six directions and noise."""
    generator = torch.Generator().manual_seed(seed)
    spikes = torch.randn(shape[0], 6, generator=generator) @ torch.randn(6, shape[1], generator=generator)
    return size * (spikes / 4 + torch.randn(shape, generator=generator))


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


TEXT = "the quick brown fox jumps over the lazy dog and runs far away from here " * 60


@pytest.fixture(scope="session")
def language_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A folder with a text, a tiny random Llama in it, and a fine-tune of that; words are tokens."""
    root = tmp_path_factory.mktemp("qt")
    torch.manual_seed(0)
    words = {word: i for i, word in enumerate(["?", *dict.fromkeys(TEXT.split())])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(words), num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config)
    folders = []
    for name in ("base", "tuned"):
        folder = root / name
        model.save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        folders.append(folder)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2 and parameter.shape[0] != len(words):
                    spikes = torch.randn(parameter.shape[0], 4) @ torch.randn(4, parameter.shape[1])
                    parameter += 0.01 * spikes + 0.01 * torch.randn(parameter.shape)
    (root / "text.txt").write_text(TEXT)
    return root, folders[0], folders[1]
