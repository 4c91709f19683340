"""Which parameters of a checkpoint are projections, and how fused ones split into the matrices that are compressed one by one.

A part of a fused weight is named `name#i`. Its matrix is always [out, in]: GPT-2's Conv1D stores [in, out] and is transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|wpe|word_embeddings|lm_head|embed_out|shared)\.weight$")
_CONV1D = re.compile(r"(^|\.)h\.\d+\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))\.weight$")


@dataclass(frozen=True)
class Part:
    """One matrix [out, in] inside a stored parameter: rows [start, end) of its (transposed) matrix `index`."""

    name: str
    shape: tuple[int, int]
    start: int = 0
    end: int = 0
    expert: int | None = None
    transposed: bool = False

    def view(self, stored: torch.Tensor) -> torch.Tensor:
        """The part as [out, in], a view of the stored parameter."""
        matrix = stored if self.expert is None else stored[self.expert]
        return (matrix.T if self.transposed else matrix)[self.start : self.end]


def is_embedding(name: str) -> bool:
    """Whether a parameter is a vocabulary table: rows are tokens, and only changed rows are stored."""
    return bool(_EMBEDDING.search(name))


def projection_parts(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[Part]:
    """The matrices to compress in one parameter; empty for everything that is not a projection."""
    if is_embedding(name) or not (name.endswith(".weight") or ".experts." in name) or "norm" in name.split(".")[-2]:
        return []
    if len(shape) == 3 and ".experts" in name:
        return [Part(f"{name}#{e}", (shape[1], shape[2]), 0, shape[1], expert=e) for e in range(shape[0])]
    if len(shape) != 2:
        return []
    transposed = config.get("model_type") == "gpt2" and bool(_CONV1D.search(name))
    out, size = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    rows = _fused_rows(name.split(".")[-2], out, config)
    if len(rows) == 1:
        return [Part(name, (out, size), 0, out, transposed=transposed)]
    parts, start = [], 0
    for i, count in enumerate(rows):
        parts.append(Part(f"{name}#{i}", (count, size), start, start + count, transposed=transposed))
        start += count
    return parts


def stored_name(part_name: str) -> str:
    """Name of the parameter that holds a part."""
    return part_name.partition("#")[0]


def _fused_rows(leaf: str, out: int, config: Mapping[str, Any]) -> list[int]:
    """Out rows of each projection that a weight holds, in order; one entry when it is not fused."""
    if leaf == "gate_up_proj" and out % 2 == 0:
        return [out // 2, out // 2]
    if leaf == "c_attn" and out % 3 == 0:
        return [out // 3] * 3
    if leaf in ("qkv_proj", "Wqkv"):
        heads = config.get("num_attention_heads", 0)
        kv_heads = config.get("num_key_value_heads") or heads
        if heads and out % (heads + 2 * kv_heads) == 0:
            width = out // (heads + 2 * kv_heads)
            return [heads * width, kv_heads * width, kv_heads * width]
    return [out]
