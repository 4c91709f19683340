"""BitDelta's scales tuned on a text, so that the logits of base + delta are the fine-tune's (arXiv 2402.10193, section 3.2).

As the authors: AdamW, 200 steps of 512 tokens, the mean squared difference of the logits; signs and everything that is no
projection stay. Otherwise than theirs: a step is relative to where a scale began (scale = start * exp(growth)), because the scales
of a model lie orders of magnitude apart; the steps shrink to zero along a cosine; and the text is the one that is given, not C4.

No logits are formed. Under one head H [V, d] the squared difference of the logits of two hidden states h and h' is
(h - h') H^T H (h - h')^T, whatever V is. Signs stay packed and blocks are run again for their gradients, so that besides the fp32
model there are a bit a weight, a weight or two unpacked, and the activations of one block.

Legend: m out features, n in features, S sequences of T tokens, d hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from compressors.baselines import BitDeltaConfig, encode_bitdelta
from compressors.calibrate import decoder_blocks
from compressors.calibration import Calibration
from compressors.errors import CheckpointError
from compressors.layout import projection_parts
from compressors.record import Encoded
from compressors.tensors import Checkpoint

_TOKENS = 512  # of a step
_RATE = 0.02  # of a scale a step, at the start


class SignedLinear(nn.Module):
    """A linear of the weight base + scale * sign, of which only the scales learn."""

    def __init__(self, linear: nn.Linear, base: torch.Tensor, encoded: Encoded) -> None:
        super().__init__()
        self.base, self.bias = base, linear.bias
        self.signs: npt.NDArray[np.uint8] = encoded.arrays["signs"]
        self.start = torch.from_numpy(encoded.arrays["scale"])
        self.growth = nn.Parameter(torch.zeros_like(self.start))

    @property
    def scale(self) -> torch.Tensor:
        """[1], or [m] with a scale a row."""
        return self.start * self.growth.exp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = SignedProduct.apply(x, self.scale, self.base, self.signs)  # type: ignore[no-untyped-call]  # torch's own
        return y if self.bias is None else y + self.bias


class SignedProduct(torch.autograd.Function):
    """x [..., n] times (base + scale * sign)^T [n, m]; signs are packed, row after row. Gradients of x and scale."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, signs: npt.NDArray[np.uint8]
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale, base)
        ctx.signs = signs
        return x @ (_unpacked(signs, base) * scale[:, None] + base).T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        x, scale, base = ctx.saved_tensors
        (dy,) = gradients
        signs = _unpacked(ctx.signs, base)
        products = (dy * (x @ signs.T)).flatten(0, -2).sum(0)  # [m]
        dscale = products if len(scale) > 1 else products.sum().reshape(1)
        return dy @ (signs * scale[:, None] + base), dscale, None, None


def _unpacked(signs: npt.NDArray[np.uint8], base: torch.Tensor) -> torch.Tensor:
    """-1 or 1 for every weight [m, n]."""
    bits = torch.from_numpy(np.unpackbits(signs, count=base.numel(), bitorder="little"))
    return bits.view(base.shape).to(base.dtype).mul_(2).sub_(1)


def distilled(
    old: Checkpoint, new: Checkpoint, config: BitDeltaConfig, calibration: Calibration, progress: bool
) -> Iterator[Encoded]:
    """All projections of the fine-tune as signs with tuned scales, which on the text are never worse than the untuned ones.

    The same seed gives the same scales on the same machine and number of threads. Raises CheckpointError for a model whose
    projections are no linears of their own.
    """
    from transformers import AutoModelForCausalLM

    tokens = calibration.tokens(new.folder)
    model = AutoModelForCausalLM.from_pretrained(new.folder, dtype=torch.float32).eval().requires_grad_(False)
    head = model.get_output_embeddings().weight
    gram = head.T @ head / len(head)
    size = max(1, _TOKENS // calibration.length)
    with torch.no_grad():
        reference = torch.cat([_hidden(model, batch) for batch in torch.split(tokens, size)])
    for block in decoder_blocks(model)[1]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    records, signed = _signed(model, old, new, config)
    if signed:
        before = _loss_on(model, tokens, reference, gram, size)
        _tune(model, list(signed.values()), tokens, reference, gram, size, config, progress)
        better = _loss_on(model, tokens, reference, gram, size) < before
    for encoded in records:
        if encoded.name in signed and better:
            encoded.arrays["scale"] = signed[encoded.name].scale.detach().numpy()
        yield encoded


def _signed(
    model: nn.Module, old: Checkpoint, new: Checkpoint, config: BitDeltaConfig
) -> tuple[list[Encoded], dict[str, SignedLinear]]:
    """The records of all projections, and the linears that the model has in their place; an unchanged one stays as it is."""
    modules = dict(model.named_modules())
    records, signed = [], {}
    for name in new.names:
        parts = projection_parts(name, new.shape(name), old.config)
        if not parts:
            continue
        module = name.removesuffix(".weight")
        linear = modules.get(module)
        if [part.name for part in parts] != [name] or not isinstance(linear, nn.Linear):
            raise CheckpointError(f"{name} is no linear of its own; compress this model without --distil")
        base = old.finite(name).float()
        delta = new.finite(name).float() - base
        if not delta.any():
            records.append(Encoded(name, "zero", (delta.shape[0], delta.shape[1])))
            continue
        records.append(encode_bitdelta(name, delta, config))
        signed[name] = SignedLinear(linear, base, records[-1])
        model.set_submodule(module, signed[name])
    return records, signed


def _tune(
    model: nn.Module,
    signed: list[SignedLinear],
    tokens: torch.Tensor,
    reference: torch.Tensor,
    gram: torch.Tensor,
    size: int,
    config: BitDeltaConfig,
    progress: bool,
) -> None:
    steps = config.distil
    optimiser = torch.optim.AdamW([one.growth for one in signed], lr=_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    generator = torch.Generator().manual_seed(config.seed % (1 << 63))
    batches: list[torch.Tensor] = []
    for _ in tqdm(range(steps), "distilling", unit="step", disable=not progress):
        batches = batches or list(torch.split(torch.randperm(len(tokens), generator=generator), size))
        chosen = batches.pop()
        optimiser.zero_grad()
        torch.autograd.backward(loss_of(_hidden(model, tokens[chosen]), reference[chosen], gram))
        optimiser.step()
        schedule.step()


@torch.no_grad()
def _loss_on(model: nn.Module, tokens: torch.Tensor, reference: torch.Tensor, gram: torch.Tensor, size: int) -> float:
    pairs = zip(torch.split(tokens, size), torch.split(reference, size), strict=True)
    return sum(float(loss_of(_hidden(model, batch), told, gram)) * len(batch) for batch, told in pairs)


def loss_of(hidden: torch.Tensor, reference: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the logits of hidden states [S, T, d]; `gram`: H^T H / V."""
    gap = hidden - reference
    return ((gap @ gram) * gap).sum(-1).mean()


def _hidden(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Last hidden states [S, T, d]."""
    hidden: torch.Tensor = model.base_model(tokens, use_cache=False).last_hidden_state
    return hidden
