"""Real delta files of every kind of record, method, mask and width, a few kilobytes each."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from compressors.baselines import BitDeltaConfig, DareConfig, LowRankConfig
from compressors.compress import compress
from compressors.impart import ImPartConfig
from compressors.mask_codes import CODES
from compressors.merge import MergeConfig, merge
from compressors.quantize import ImPartQtConfig
from compressors.values import VALUE_DTYPES
from tests.compressors.conftest import LAYER, Tensors, base_tensors, tuned_tensors

CONFIGS = {
    **{f"impart-{dtype}": ImPartConfig(ratio=4.0, value_dtype=dtype) for dtype in VALUE_DTYPES},
    **{f"impart-{code}": ImPartConfig(ratio=4.0, value_dtype="int4", mask=code) for code in CODES},
    "impart-qt": ImPartQtConfig(ratio=8.0),
    "impart-qt-gap8": ImPartQtConfig(ratio=8.0, mask="gap8"),
    "lowrank": LowRankConfig(ratio=4.0, value_dtype="bf16"),
    **{f"dare-{dtype}": DareConfig(ratio=4.0, value_dtype=dtype) for dtype in VALUE_DTYPES},
    **{f"dare-{code}": DareConfig(ratio=4.0, value_dtype="int4", mask=code) for code in CODES},
    "bitdelta": BitDeltaConfig(),
    "bitdelta-rows": BitDeltaConfig(per_row=True, rows_dtype="fp16"),
}


def write_corpus(folder: Path) -> tuple[Path, list[Path]]:
    """The base and the files, in `folder`."""
    base, tuned, adapted = folder / "base", folder / "tuned", folder / "adapted"
    _write(base, base_tensors())
    _write(tuned, _whole_fine_tune())
    _write(adapted, _of_low_rank(), chat_template="{{ messages }}")
    files = []
    for name, config in CONFIGS.items():
        files.append(folder / name)
        compress(base, tuned, files[-1], config)
    files.append(folder / "whole-rank")
    compress(base, adapted, files[-1], ImPartConfig(ratio=4.0))
    for name, config in (
        ("ta", MergeConfig(weights=(0.5, 1.5))),
        ("ta-gap8", MergeConfig(mask="gap8")),
        ("ties", MergeConfig(method="ties", dense_dtype="bf16")),
    ):
        files.append(folder / name)
        merge([folder / "impart-int4", folder / "dare-int8"], base, files[-1], config)
    return base, files


def _whole_fine_tune() -> Tensors:
    """Projections, a norm, some rows of the vocabulary, and two tokens more."""
    tensors = tuned_tensors()
    table = tensors["model.embed_tokens.weight"].clone()
    table[5:9] += 0.1
    tensors["model.embed_tokens.weight"] = torch.cat([table, torch.ones(2, 48)])
    tensors["model.norm.weight"] = torch.full((48,), 1.25)
    return tensors


def _of_low_rank() -> Tensors:
    tensors = base_tensors()
    name = f"{LAYER}.mlp.up_proj.weight"
    tensors[name] = tensors[name] + torch.outer(torch.arange(96.0), torch.arange(48.0)) / 1000
    return tensors


def _write(folder: Path, tensors: Tensors, **tokenizer: str) -> None:
    folder.mkdir()
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
