"""Does the context contradict what the model remembers? A linear probe of the stream at the last prompt token (SpARE, section 2).

L2-regularised logistic regression on standardised rows, solved by Newton's method: deterministic, and a few matrix products, where
the authors restart Adam with an L1 penalty twenty times.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from steering.errors import FitError

_MIN_PER_CLASS = 8
_STEPS, _TOLERANCE = 50, 1e-8


@dataclass(frozen=True)
class Probe:
    """Reads stream rows after `layer`: score = sigmoid(weight . (h - mean) / std + bias). weight, mean, std [d], bias [1], fp32."""

    layer: int
    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def score(self, h: torch.Tensor) -> torch.Tensor:
        """P(conflict) [N] of fp32 stream rows [N, d], in 0..1."""
        return torch.sigmoid((h.float() - self.mean) / self.std @ self.weight + self.bias)


@dataclass(frozen=True)
class FittedProbe:
    """A probe and what it is worth on held-out groups. `threshold`: the score that parts the training samples best."""

    probe: Probe
    auroc: float
    accuracy: float
    auprc: float
    threshold: float
    n: int  # held-out samples


def fit_probe(
    h: torch.Tensor,
    y: torch.Tensor,
    groups: Sequence[Hashable],
    layer: int = 0,
    held_out: float = 0.3,
    seed: int = 0,
    penalty: float = 1e-2,
) -> FittedProbe:
    """Fit on rows h [N, d] with labels y [N] (1: the context contradicts memory); a group stays on one side.

    `penalty` is the L2 weight per training sample. Raises FitError for bad shapes or labels, and for too few samples.
    """
    if h.dim() != 2 or y.shape != h.shape[:1] or len(groups) != len(h):
        raise FitError(f"rows {list(h.shape)}, labels {list(y.shape)} and {len(groups)} groups do not fit together")
    if not bool(torch.isfinite(h).all()):
        raise FitError("the rows have values that are not finite")
    if not bool(((y == 0) | (y == 1)).all()):
        raise FitError("labels must be 1 (the context contradicts memory) or 0 (it agrees)")
    names = sorted(set(groups), key=repr)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    kept_out = {names[i] for i in order[: round(held_out * len(names))]}
    test = torch.tensor([group in kept_out for group in groups])
    for name, side in (("training", ~test), ("held-out", test)):
        counts = [int((y[side] == label).sum()) for label in (0, 1)]
        if min(counts) < _MIN_PER_CLASS:
            raise FitError(
                f"{name} samples: {counts[1]} with and {counts[0]} without a conflict, {_MIN_PER_CLASS} needed of each"
            )
    probe = logistic_probe(h[~test], y[~test], penalty, layer)
    train_scores, scores = probe.score(h[~test]), probe.score(h[test])
    threshold = best_threshold(train_scores, y[~test])
    truth = y[test].bool()
    return FittedProbe(
        probe,
        auroc(scores, truth),
        float(((scores >= threshold) == truth).float().mean()),
        auprc(scores, truth),
        threshold,
        len(truth),
    )


def auroc(scores: torch.Tensor, truth: torch.Tensor) -> float:
    """Area under the ROC curve of scores [N] for bool labels [N]; ties count half. Raises FitError for one class only."""
    truth = truth.bool()
    if bool(truth.all()) or not bool(truth.any()):
        raise FitError("AUROC needs samples of both classes")
    wins = scores[truth][:, None] - scores[~truth][None]
    return float((wins > 0).double().mean() + 0.5 * (wins == 0).double().mean())


def auprc(scores: torch.Tensor, truth: torch.Tensor) -> float:
    """Average precision of scores [N] for bool labels [N]."""
    hits = truth.bool()[torch.argsort(scores, descending=True, stable=True)].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / hits.sum())


def logistic_probe(h: torch.Tensor, y: torch.Tensor, penalty: float, layer: int) -> Probe:
    """The probe of least penalised loss: rows h [N, d], targets y [N] in 0..1, `penalty` the L2 weight per row.

    Newton's method on standardised rows with a bias column, which is hardly penalised. The best weights lie in the span of the
    rows, so that fewer rows than values are first turned into coordinates of that span.
    """
    h, y = h.double(), y.double()
    mean, std = h.mean(0), h.std(0).clamp_min(1e-6)
    rows = (h - mean) / std
    basis = torch.linalg.qr(rows.T)[0] if len(rows) < rows.shape[1] else None
    x = torch.cat([rows if basis is None else rows @ basis, torch.ones(len(h), 1, dtype=h.dtype)], dim=1)
    ridge = torch.full((x.shape[1],), penalty * len(x), dtype=h.dtype)
    ridge[-1] = 1e-6
    w = torch.zeros(x.shape[1], dtype=h.dtype)
    for _ in range(_STEPS):
        p = torch.sigmoid(x @ w)
        gradient = x.T @ (p - y) + ridge * w
        hessian = (x.T * (p * (1 - p)).clamp_min(1e-9)) @ x + torch.diag(ridge)
        move = torch.linalg.solve(hessian, gradient)
        w = w - move
        if float(move.abs().max()) < _TOLERANCE:
            break
    weight = w[:-1] if basis is None else basis @ w[:-1]
    return Probe(layer, weight.float(), w[-1:].float(), mean.float(), std.float())


def best_threshold(scores: torch.Tensor, y: torch.Tensor) -> float:
    """The score that parts the two classes with the fewest errors; half way between its neighbours."""
    order = torch.argsort(scores)
    ranked, truth = scores[order], y[order].bool()
    below_wrong = truth.long().cumsum(0)
    above_wrong = (~truth).long().sum() - (~truth).long().cumsum(0)
    best = int((below_wrong + above_wrong).argmin())
    if best + 1 == len(ranked):
        return float(ranked[best])
    return float((ranked[best] + ranked[best + 1]) / 2)
