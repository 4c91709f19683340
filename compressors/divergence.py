"""How far a compressed fine-tune is from the fine-tune itself: KL(fine-tune || base + delta) of the next token on a text.

This, and never the delta's Frobenius error, is what methods and settings are compared by: ImPart's unbiased, loud estimate
loses to plain truncation in the norm and beats it in what the model says (arXiv 2504.13237; the notes' measurements agree).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import kl_div, nll_loss

from compressors.artifact import Artifact
from compressors.calibration import Calibration
from compressors.decompress import merged_weight
from compressors.errors import CheckpointError
from compressors.tensors import Checkpoint

_SEQUENCES = 4  # in one forward
_POSITIONS = 512  # whose logits are held at once
_ANSWERS = 32  # prompts answered at once
_NONE = -100  # no token


@dataclass(frozen=True)
class Distance:
    """Means over the text in nats a token: `kl` from the fine-tune's next token, `loss` of the text's own."""

    kl: float
    loss: float


class Divergence:
    """A fine-tune on a text. Holds one fp32 model and the fine-tune's last hidden states [S, T, d], no logits.

    Raises CheckpointError for a model that transformers cannot load as a causal one, or for too short a text.
    """

    def __init__(self, base: Path, fine_tune: Path, calibration: Calibration) -> None:
        from transformers import AutoModelForCausalLM

        self.tokens = calibration.tokens(fine_tune)
        self._base, self._fine_tune = base, fine_tune
        try:
            self._model = AutoModelForCausalLM.from_pretrained(fine_tune, dtype=torch.float32).eval()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{fine_tune} is no causal language model that transformers can load: {error}"
            ) from None
        self._head: nn.Module = self._model.get_output_embeddings()
        self._reference_head = self._head.weight.detach().clone()
        self._reference = torch.cat(list(self._hidden()))

    def of(self, delta: Path) -> Distance:
        """Of base + delta."""
        with Checkpoint(self._base) as old, Artifact.open(delta) as artifact:
            return self._measured(lambda name: merged_weight(artifact, name, old))

    def of_model(self, folder: Path) -> Distance:
        """Of a model folder with the fine-tune's parameters: the base, or the fine-tune itself."""
        with Checkpoint(folder) as found:
            return self._measured(found.floats)

    @torch.no_grad()
    def answers(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers of what was measured last, each to its prompt alone as one user message."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._fine_tune)
        texts: list[str] = []
        for start in range(0, len(prompts), _ANSWERS):
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + _ANSWERS]]
            rows = [
                tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
                for chat in chats
            ]
            width = max(map(len, rows))
            ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
            for place, row in enumerate(rows):  # on the left, so that all answers begin at one place
                ids[place, width - len(row) :] = torch.tensor(row)
                mask[place, width - len(row) :] = 1
            output = self._model.generate(
                ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
            )
            texts += tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return texts

    @torch.no_grad()
    def _measured(self, weight: Callable[[str], torch.Tensor]) -> Distance:
        for name, parameter in self._model.named_parameters():
            parameter.copy_(weight(name))
        kl = loss = 0.0
        batches = zip(
            torch.split(self.tokens, _SEQUENCES), torch.split(self._reference, _SEQUENCES), self._hidden(), strict=True
        )
        for tokens, reference, hidden in batches:
            one = self._summed(tokens, reference, hidden)
            kl, loss = kl + one.kl, loss + one.loss
        return Distance(kl / self.tokens.numel(), loss / self.tokens[:, 1:].numel())

    @torch.no_grad()
    def _hidden(self) -> Iterator[torch.Tensor]:
        for batch in torch.split(self.tokens, _SEQUENCES):
            yield self._model.base_model(batch, use_cache=False).last_hidden_state

    def _summed(self, tokens: torch.Tensor, reference: torch.Tensor, hidden: torch.Tensor) -> Distance:
        """Sums over the positions of [S, T]; the last of a sequence has no next token."""
        following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], _NONE)], 1).flatten()
        kl = loss = 0.0
        for start in range(0, len(following), _POSITIONS):
            place = slice(start, start + _POSITIONS)
            told = torch.log_softmax(reference.flatten(0, 1)[place] @ self._reference_head.T, -1)
            found = torch.log_softmax(self._head(hidden.flatten(0, 1)[place]), -1)
            kl += float(kl_div(found, told, reduction="sum", log_target=True))
            loss += float(nll_loss(found, following[place], ignore_index=_NONE, reduction="sum"))
        return Distance(kl, loss)
