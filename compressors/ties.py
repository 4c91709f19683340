"""TIES merging (arXiv 2306.01708, section 4; as ImPart, arXiv 2504.13237, section 5 uses it): trim, elect signs, average.

Per tensor, as ImPart's experiments: the authors of TIES trim over a whole model. `retain` is the share that is kept, as in both
papers; ImPart's released code takes the share that is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

# Deltas of one tensor, fp32 and all of one shape, and their weights; read anew at every call, so that only one is in memory.
Deltas = Callable[[], Iterable[tuple[torch.Tensor, float]]]


def ties(deltas: Deltas, retain: float, numel: int) -> torch.Tensor:
    """The merged delta: weighted average of the trimmed entries whose sign is that of the weighted sum; 0 where that is 0.

    `numel` is the size of the whole tensor, of which `deltas` may hold the changed rows alone.
    """
    keep = max(1, round(retain * numel))
    total = torch.zeros(())
    for delta, weight in deltas():
        total = total + weight * trim(delta, keep)
    sign = total.sign()
    total, share = torch.zeros_like(total), torch.zeros_like(total)
    for delta, weight in deltas():
        entries = weight * trim(delta, keep)
        agree = entries.sign() * sign > 0
        total += entries.where(agree, torch.zeros(()))
        share += abs(weight) * agree
    return total / share.where(share > 0, torch.ones(()))


def trim(delta: torch.Tensor, keep: int) -> torch.Tensor:
    """`delta` with its `keep` entries of the largest magnitude, and those that equal the smallest of them; the others are 0."""
    if keep >= delta.numel():
        return delta
    magnitude = delta.abs()
    bound = magnitude.reshape(-1).kthvalue(delta.numel() - keep + 1).values
    return delta.where(magnitude >= bound, torch.zeros(()))
