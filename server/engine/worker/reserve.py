"""The reserve: rows behind the base's own in the vocabulary tables, for the tokens that fine-tunes add.

The engine is told of a vocabulary that is larger by the reserve, so that its tables, logits, penalties and grammars all have the
same width. The reserved rows stay zero: an added token's row is a change like any other (vocabulary.py), and what a row of the
batch has not got is withheld from its logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

RESERVE_KEY = "reserved_tokens"


class ReserveError(Exception):
    """The served model cannot have rows for added tokens."""


def install(config_key: str) -> None:
    """Wrap the loading of vocabulary tables; a second call does nothing. Engines without a reserve load as before."""
    inner = VocabParallelEmbedding.weight_loader
    if not getattr(inner, "deltaworks", False):
        VocabParallelEmbedding.weight_loader = _padding(inner, config_key)


def _padding(inner: Callable[..., None], config_key: str) -> Callable[..., None]:
    @functools.wraps(inner)
    def weight_loader(self: Any, param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
        settings = get_current_vllm_config().additional_config
        reserved = settings.get(config_key, {}).get(RESERVE_KEY, 0) if isinstance(settings, dict) else 0
        if reserved and getattr(param, "output_dim", None) == 0:
            loaded_weight = grown(loaded_weight, self.org_vocab_size - reserved, reserved)
        inner(self, param, loaded_weight)

    weight_loader.deltaworks = True  # type: ignore[attr-defined]  # the mark that `install` looks for
    return weight_loader


def grown(table: torch.Tensor, known: int, reserved: int) -> torch.Tensor:
    """A stored table [known, ...] with `reserved` rows of zeros behind it. Raises ReserveError for one of another height."""
    if table.shape[0] != known:
        raise ReserveError(
            f"a vocabulary table of the checkpoint has {table.shape[0]} rows and its configuration says {known}: such a model "
            "cannot have added tokens; set engine.reserved_tokens to 0"
        )
    return torch.cat([table, table.new_zeros(reserved, *table.shape[1:])])
