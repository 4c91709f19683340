"""Which parameters of a checkpoint are projections, and how fused ones split into the matrices that are compressed one by one.

A part of a fused weight is named `name#i`. Its matrix is always [out, in]: GPT-2's Conv1D stores [in, out] and is transposed, and
so are expert stacks of the kind [experts, in, out]. No torch: `verify` rests on this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|embed_positions|embed_in|wte|wpe|word_embeddings|lm_head|embed_out|shared)\.weight$"
)
_INPUT_TABLE = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|word_embeddings|shared)\.weight$")
_CONV1D = re.compile(r"(^|\.)h\.\d+\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))\.weight$")
_ROUTERS = (
    "gate",
    "router",
    "shared_expert_gate",
)  # too small to gain from factors, and every token's route hangs on them
_BUFFERS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
)  # stored by old checkpoints, computed by every loader

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Part:
    """One matrix [out, in] inside a stored parameter: rows [start, end) of the (transposed) matrix, of one expert in a stack."""

    name: str
    shape: tuple[int, int]
    start: int
    end: int
    expert: int | None = None
    transposed: bool = False

    def view(self, stored: torch.Tensor) -> torch.Tensor:
        """The part as [out, in], a view of the stored parameter."""
        matrix = stored if self.expert is None else stored[self.expert]
        return (matrix.T if self.transposed else matrix)[self.start : self.end]


def is_buffer(name: str) -> bool:
    """Whether a stored tensor is no parameter: masks and rotary tables that follow from the configuration."""
    return name.endswith(_BUFFERS)


def is_embedding(name: str) -> bool:
    """Whether a parameter is a vocabulary table: rows are tokens, and only changed rows are stored."""
    return bool(_EMBEDDING.search(name))


def input_table(names: Iterable[str]) -> str | None:
    """The token embedding among parameter names, which a tied head repeats."""
    return next((name for name in sorted(names) if _INPUT_TABLE.search(name)), None)


def vocabulary_tables(names: Iterable[str]) -> list[str]:
    """Token embedding and head among parameter names: both have a row a token."""
    known = set(names)
    return [name for name in (input_table(known), HEAD) if name is not None and name in known]


def is_projection(name: str, dims: int) -> bool:
    """Whether a stored parameter with so many dimensions holds projections: a matrix, or a stack of experts' matrices."""
    leaf = _leaf(name)
    if is_embedding(name) or "norm" in leaf or leaf in _ROUTERS:
        return False
    return (dims == 2 and name.endswith(".weight")) or (dims == 3 and ".experts." in name)


def projection_parts(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[Part]:
    """The matrices to compress in one parameter; empty for everything that is not a projection."""
    if not is_projection(name, len(shape)):
        return []
    stacked = len(shape) == 3
    transposed = _stack_is_transposed(_leaf(name), shape, config) if stacked else _is_conv1d(name, config)
    out, size = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
    rows = _fused_rows(_leaf(name), out, config)
    starts = [sum(rows[:i]) for i in range(len(rows))]
    pieces = [
        (expert, start, start + count)
        for expert in (range(shape[0]) if stacked else (None,))
        for start, count in zip(starts, rows, strict=True)
    ]
    if len(pieces) == 1 and not stacked:
        return [Part(name, (out, size), 0, out, transposed=transposed)]
    return [
        Part(f"{name}#{i}", (end - start, size), start, end, expert, transposed)
        for i, (expert, start, end) in enumerate(pieces)
    ]


def stored_name(part_name: str) -> str:
    """Name of the parameter that holds a part."""
    return part_name.partition("#")[0]


def _leaf(name: str) -> str:
    """Name of the module that owns a parameter; expert stacks are parameters of their own name."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _is_conv1d(name: str, config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "gpt2" and bool(_CONV1D.search(name))


def _stack_is_transposed(leaf: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> bool:
    """Whether a stack is [experts, in, out]: the hidden size is the input of gate and up, and the output of down."""
    out, size = shape[-2], shape[-1]
    hidden = config.get("hidden_size")
    return size == hidden != out if leaf.startswith("down") else out == hidden != size


def _fused_rows(leaf: str, out: int, config: Mapping[str, Any]) -> list[int]:
    """Out rows of each projection that a weight holds, in order; one entry when it is not fused."""
    if leaf == "gate_up_proj" and out % 2 == 0:
        return [out // 2, out // 2]
    if leaf in ("c_attn", "W_pack") and out % 3 == 0:
        return [out // 3] * 3
    if leaf in ("qkv_proj", "Wqkv"):
        heads = config.get("num_attention_heads", 0)
        kv_heads = config.get("num_key_value_heads") or heads
        if heads and out % (heads + 2 * kv_heads) == 0:
            width = out // (heads + 2 * kv_heads)
            return [heads * width, kv_heads * width, kv_heads * width]
    return [out]
