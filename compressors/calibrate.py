"""The inputs of every projection on a calibration text, and the rounding that they ask for (ImPart-Qt with GPTQ).

Block after block, and in a block stage after stage, as the authors do: linears that read the same input are one stage
({q, k, v}, {o}, {gate, up}, {down} in Llama). The inputs of a stage come from what was rounded before it, so that later
projections make up for earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from compressors.calibration import Calibration
from compressors.decompress import delta_tensor
from compressors.encode import as_record, whole_rank
from compressors.errors import CheckpointError
from compressors.gptq import round_factors
from compressors.layout import projection_parts
from compressors.mask_codes import code_of
from compressors.quantize import ImPartQtConfig
from compressors.record import Encoded, Unwritten
from compressors.spectrum import decompose
from compressors.tensors import Checkpoint

_SEQUENCES = 4  # that run through a block at once


def calibrated(
    old: Checkpoint, new: Checkpoint, config: ImPartQtConfig, calibration: Calibration, progress: bool
) -> Iterator[Encoded]:
    """All projections of the fine-tune, rounded by the activations, in the order of the stages.

    Raises CheckpointError for a model whose blocks are not understood.
    """
    from transformers import AutoModelForCausalLM

    tokens = calibration.tokens(new.folder)
    model = AutoModelForCausalLM.from_pretrained(new.folder, dtype=torch.float32).eval()
    prefix, blocks = decoder_blocks(model)
    with torch.no_grad():
        runs = _entering(model, blocks[0], tokens)
        for index, block in enumerate(tqdm(blocks, "rounding", unit="block", disable=not progress)):
            for stage in _stages(block, runs[0]):
                hessian = _hessian(block, stage[0][1], runs)
                for name, linear in stage:
                    encoded, weight = _rounded(old, new, f"{prefix}.{index}.{name}.weight", config, hessian)
                    linear.weight.copy_(weight)
                    yield encoded
            runs = [run.through(block) for run in runs]


def _rounded(
    old: Checkpoint, new: Checkpoint, name: str, config: ImPartQtConfig, hessian: torch.Tensor
) -> tuple[Encoded, torch.Tensor]:
    """The record of one projection, and the weight that will be served."""
    shape = new.shape(name)
    if [part.name for part in projection_parts(name, shape, old.config)] != [name]:
        raise CheckpointError(f"{name} is no projection of its own; round this model to nearest, without a calibration")
    before = old.finite(name).float()
    delta = new.finite(name).float() - before
    if not delta.any():
        return Encoded(name, "zero", (delta.shape[0], delta.shape[1])), before
    spectrum, matrix = decompose(delta), (delta.shape[0], delta.shape[1])
    if config.keeps_whole(spectrum, matrix):
        encoded = whole_rank(name, spectrum, matrix)
    else:
        drops = config.drops(spectrum, name, matrix)
        factors = round_factors(spectrum, drops, name, config.seed, config.rescale, hessian)
        encoded = as_record(name, factors, delta, config.seed, code_of(config.mask))
    return encoded, before + delta_tensor(Unwritten(config.seed, encoded, mask=code_of(config.mask)), name)


@dataclass
class _Run:
    """Sequences on their way through the blocks: hidden states [S, T, d] and what else a block is called with."""

    hidden: torch.Tensor
    others: tuple[Any, ...]
    named: dict[str, Any]

    def call(self, block: nn.Module) -> torch.Tensor:
        out = block(self.hidden, *self.others, **self.named)
        hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return hidden

    def through(self, block: nn.Module) -> _Run:
        return _Run(self.call(block), self.others, self.named)


class _EnoughError(Exception):
    """The first block was reached; the rest of the forward is not needed."""


def decoder_blocks(model: nn.Module) -> tuple[str, Sequence[nn.Module]]:
    """The decoder's blocks and their prefix in the names of parameters."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.split(".")[-1] in ("layers", "h") and len(module):
            return name, list(module)
    raise CheckpointError(f"{type(model).__name__} has no list of decoder blocks; leave the calibration out")


def _entering(model: nn.Module, first: nn.Module, tokens: torch.Tensor) -> list[_Run]:
    """What the first block is called with."""
    runs: list[_Run] = []

    def catch(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden, others = (args[0], args[1:]) if args else (named.pop("hidden_states"), ())
        runs.append(_Run(hidden, others, named))
        raise _EnoughError

    handle = first.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in torch.split(tokens, _SEQUENCES):
            try:
                model(batch, use_cache=False)
            except _EnoughError:
                continue
    finally:
        handle.remove()
    return runs


def _stages(block: nn.Module, run: _Run) -> list[list[tuple[str, nn.Linear]]]:
    """The block's linears in the order of their calls; those that are given the same tensor are one stage."""
    seen: list[tuple[torch.Tensor, list[tuple[str, nn.Linear]]]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(module, nn.Linear)
            if not (seen and seen[-1][0] is args[0]):
                seen.append((args[0], []))
            seen[-1][1].append((name, module))

        return hook

    with ExitStack() as hooks:
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                hooks.callback(module.register_forward_pre_hook(note(name)).remove)
        run.call(block)
    return [stage for _, stage in seen]


def _hessian(block: nn.Module, linear: nn.Linear, runs: Sequence[_Run]) -> torch.Tensor:
    """X^T X [n, n] over all positions that reach `linear`."""
    total = torch.zeros(linear.in_features, linear.in_features)

    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].reshape(-1, linear.in_features)
        total.addmm_(rows.T, rows)

    handle = linear.register_forward_pre_hook(add)
    try:
        for run in runs:
            run.call(block)
    finally:
        handle.remove()
    return total
