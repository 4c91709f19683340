"""How good a set of SAEs is: on held-out rows, and by what the model loses when it reads the reconstruction instead."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steering.activations import changed_streams
from steering.sae import SAE
from trainers.sae_loop import Trained

_CHUNK = 1024


@dataclass(frozen=True)
class LayerReport:
    """`fvu`: sum ||x - x_hat||^2 / sum ||x - mean||^2; `loss_recovered`: (zero - sae) / (zero - clean), position 0 untouched."""

    layer: int
    fvu: float
    l0: float
    cosine: float
    dead_share: float  # latents that did not fire in the last rows of training (the recipe's dead_after)
    loss_recovered: float
    loss_clean: float  # nats per token
    loss_sae: float
    loss_zero: float
    rows: int
    steps: int


@dataclass(frozen=True)
class Measured:
    """The report of a layer, and of every latent [n] how often it fired and its largest activation (0: it never fired)."""

    report: LayerReport
    rates: torch.Tensor
    maxima: torch.Tensor


def measure(
    layer: int, sae: SAE, rows: npt.NDArray[np.float16], trained: Trained, model: Any, sequences: torch.Tensor
) -> Measured:
    """`rows` [N, d] and `sequences` [S, context] were not trained on."""
    squared = cosine = active = 0.0
    fired, maxima = torch.zeros(sae.d_sae), torch.zeros(sae.d_sae)
    mean = torch.from_numpy(rows.astype(np.float32)).mean(0)
    total = 0.0
    for start in range(0, len(rows), _CHUNK):
        x = torch.from_numpy(rows[start : start + _CHUNK].astype(np.float32))
        z = sae.encode(x)
        x_hat = sae.decode(z)
        squared += float((x - x_hat).square().sum())
        total += float((x - mean).square().sum())
        cosine += float(torch.cosine_similarity(x, x_hat).sum())
        active += float((z > 0).sum())
        fired += (z > 0).sum(0)
        maxima = torch.maximum(maxima, z.amax(0))
    clean, spliced, zero = (_loss(model, sequences, layer, change) for change in (None, sae, 0.0))
    report = LayerReport(
        layer=layer,
        fvu=squared / total,
        l0=active / len(rows),
        cosine=cosine / len(rows),
        dead_share=trained.dead_share,
        loss_recovered=(zero - spliced) / (zero - clean),
        loss_clean=clean,
        loss_sae=spliced,
        loss_zero=zero,
        rows=len(rows),
        steps=trained.steps,
    )
    return Measured(report, fired / len(rows), maxima)


def _loss(model: Any, sequences: torch.Tensor, layer: int, change: SAE | float | None) -> float:
    """Mean next-token loss with the stream after `layer` as it is, reconstructed, or zero, at every position but 0."""

    def replaced(stream: torch.Tensor) -> torch.Tensor:
        if change is None:
            return stream
        rest = stream[:, 1:]
        new = (
            change.reconstruct(rest.reshape(-1, rest.shape[-1])).view_as(rest)
            if isinstance(change, SAE)
            else rest * change
        )
        return torch.cat([stream[:, :1], new], dim=1)

    with torch.inference_mode(), changed_streams(model, {layer: replaced}):
        losses = [model(input_ids=batch, labels=batch, use_cache=False).loss for batch in torch.split(sequences, 4)]
    return float(torch.stack(losses).mean())


def table(reports: list[LayerReport]) -> str:
    """The reports as a Markdown table."""
    lines = [
        "| layer | FVU | L0 | cosine | dead | loss recovered | loss clean / SAE / zero |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.layer} | {r.fvu:.3f} | {r.l0:.1f} | {r.cosine:.3f} | {r.dead_share:.1%} | {r.loss_recovered:.3f} "
        f"| {r.loss_clean:.2f} / {r.loss_sae:.2f} / {r.loss_zero:.2f} |"
        for r in reports
    ]
    return "\n".join(lines)


def as_json(reports: list[LayerReport]) -> list[dict[str, Any]]:
    return [asdict(report) for report in reports]


def plot(trained: dict[int, Trained], rates: dict[int, torch.Tensor], path: Path) -> None:
    """Two panels: FVU while training, and how often latents fire, per layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for layer, found in trained.items():
        left.plot(*zip(*found.curve, strict=True), label=f"layer {layer}")
        right.hist(torch.log10(rates[layer].clamp_min(1e-5)).numpy(), bins=60, histtype="step", label=f"layer {layer}")
    left.set(xlabel="step", ylabel="FVU of the training batches", ylim=(0, None), title="reconstruction")
    right.set(xlabel="log10 of the firing rate (left edge: never)", ylabel="latents", title="firing on held-out rows")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
