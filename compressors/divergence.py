"""How far a compressed fine-tune is from the fine-tune itself: KL(fine-tune || base + delta) of the next token on a text.

This, and never the delta's Frobenius error, is what methods and settings are compared by: ImPart's unbiased, loud estimate
loses to plain truncation in the norm and beats it in what the model says (arXiv 2504.13237; the notes' measurements agree).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import kl_div

from compressors.artifact import Artifact
from compressors.calibration import Calibration
from compressors.decompress import merged_weight
from compressors.errors import CheckpointError
from compressors.tensors import Checkpoint

_SEQUENCES = 4  # in one forward
_POSITIONS = 512  # whose logits are held at once


class Divergence:
    """A fine-tune on a text. Holds one fp32 model and the fine-tune's last hidden states [S, T, d], no logits.

    Raises CheckpointError for a model that transformers cannot load as a causal one, or for too short a text.
    """

    def __init__(self, base: Path, fine_tune: Path, calibration: Calibration) -> None:
        from transformers import AutoModelForCausalLM

        self.tokens = calibration.tokens(fine_tune)
        self._base = base
        try:
            self._model = AutoModelForCausalLM.from_pretrained(fine_tune, dtype=torch.float32).eval()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{fine_tune} is no causal language model that transformers can load: {error}"
            ) from None
        self._head: nn.Module = self._model.get_output_embeddings()
        self._reference_head = self._head.weight.detach().clone()
        self._reference = torch.cat(list(self._hidden()))

    def of(self, delta: Path) -> float:
        """Mean KL in nats over all positions of the text."""
        with Checkpoint(self._base) as old, Artifact.open(delta) as artifact, torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(merged_weight(artifact, name, old))
        total = 0.0
        for reference, hidden in zip(torch.split(self._reference, _SEQUENCES), self._hidden(), strict=True):
            total += self._summed(reference, hidden)
        return total / self.tokens.numel()

    @torch.no_grad()
    def _hidden(self) -> Iterator[torch.Tensor]:
        for batch in torch.split(self.tokens, _SEQUENCES):
            yield self._model.base_model(batch, use_cache=False).last_hidden_state

    @torch.no_grad()
    def _summed(self, reference: torch.Tensor, hidden: torch.Tensor) -> float:
        total = 0.0
        pairs = zip(
            torch.split(reference.flatten(0, 1), _POSITIONS), torch.split(hidden.flatten(0, 1), _POSITIONS), strict=True
        )
        for ours, theirs in pairs:
            told = torch.log_softmax(ours @ self._reference_head.T, -1)
            found = torch.log_softmax(self._head(theirs), -1)
            total += float(kl_div(found, told, reduction="sum", log_target=True))
        return total
