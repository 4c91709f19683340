"""Mask-aware GPTQ of a sparse factor pair (GPTQ: arXiv 2210.17323; ImPart-Qt: arXiv 2504.13237, section 4).

GPTQ rounds a weight column after column and moves what a column lost to the columns that are still open, as far as the
activations tell. Here entries outside the mask are zero before and after: each column is masked when it is reached, so that lost
parts come from kept entries only.

Legend: m out features, n in features, r rank. V is rounded as rows [r, n] under the Hessian of the layer's inputs H = X^T X
[n, n]; U as [m, r] under that of the projected inputs, D V^T H V D with the rounded V and D = diag(coef).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from compressors.impart import SparseFactors, kept_counts
from compressors.masks import factor_rows, layer_seed
from compressors.packing import largest, pack
from compressors.quantize import column_groups, column_widths
from compressors.spectrum import Spectrum
from compressors.values import round_columns

_Round = Callable[[torch.Tensor, int], torch.Tensor]

_BLOCK = 128  # columns whose losses are moved on together
_DAMPING = 0.01  # of the Hessian's mean diagonal


def round_factors(
    spectrum: Spectrum, drops: Sequence[float], name: str, seed: int, rescale: str, hessian: torch.Tensor
) -> SparseFactors:
    """The sparse factors of `sparsify`, rounded for the inputs whose Hessian [n, n] is given."""
    rank = sum(1 for drop in drops if drop < 1)
    drop = np.asarray(drops[:rank], dtype=np.float64)
    key, widths = layer_seed(seed, name), column_widths(rank)
    triples = spectrum.leading(rank)
    coef = triples.s.double().numpy()
    sides = []
    for f, columns in ((1, triples.vt), (0, triples.u.T)):
        height = columns.shape[1]
        keep = kept_counts(drop, height)
        mask = _mask(factor_rows(key, f, height, keep), keep, height)
        scaled = columns * float(np.sqrt(height)) * mask
        grow = height / keep if rescale == "exact" else 1 / (1 - drop)
        if f == 1:
            codes, step = round_rows(scaled, mask, hessian, widths)
        else:
            codes, step = round_in_order(scaled.T.contiguous(), mask.T.contiguous(), hessian, widths)
            codes = codes.T
        coef *= step * grow / np.sqrt(height)
        sides.append((keep, _packed(codes, mask, rank)))
        if f == 1:  # what U multiplies
            seen = torch.from_numpy(codes).float() * torch.from_numpy(coef).float()[:, None]
            hessian = seen @ hessian @ seen.T
    (keep_v, v_vals), (keep_u, u_vals) = sides
    return SparseFactors(coef.astype(np.float32), keep_u, keep_v, u_vals, v_vals, column_groups(rank))


def round_rows(
    weight: torch.Tensor, mask: torch.Tensor, hessian: torch.Tensor, widths: Sequence[int]
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float64]]:
    """Codes [R, n] of a masked weight [R, n] whose row k has widths[k] bits, and the step [R] of each row.

    The columns are taken in the order of falling diagonal of the Hessian (act-order), the steps from the weight as it is.
    """
    steps = np.array([_step(row[kept], width) for row, kept, width in zip(weight, mask.bool(), widths, strict=True)])
    step = torch.from_numpy(steps).float()[:, None]
    top = torch.tensor([largest(width) for width in widths], dtype=torch.float32)[:, None]
    order = hessian.diagonal().argsort(descending=True, stable=True)
    mixed = _inverse_root(hessian[order][:, order])

    def rounded(column: torch.Tensor, place: int) -> torch.Tensor:
        return torch.clamp(torch.round(column[:, None] / step), -top, top)[:, 0] * step[:, 0]

    found = _walk(weight[:, order], mask[:, order], mixed, rounded)
    codes = torch.empty_like(found)
    codes[:, order] = torch.round(found / step)
    return codes.numpy().astype(np.int8), steps


def round_in_order(
    weight: torch.Tensor, mask: torch.Tensor, hessian: torch.Tensor, widths: Sequence[int]
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float64]]:
    """Codes [m, r] of a masked weight [m, r] whose column k has widths[k] bits, and the step [r] of each column.

    The columns are taken in order, since the wide ones come first; a column's step is chosen when it is reached.
    """
    mixed = _inverse_root(hessian)
    steps = np.empty(weight.shape[1])

    def rounded(column: torch.Tensor, place: int) -> torch.Tensor:
        kept = mask[:, place].bool()
        steps[place] = _step(column[kept], widths[place])
        top = largest(widths[place])
        step = float(steps[place])
        return torch.clamp(torch.round(column / step), -top, top) * step

    found = _walk(weight, mask, mixed, rounded)
    return torch.round(found / torch.from_numpy(steps).float()).numpy().astype(np.int8), steps


def _walk(weight: torch.Tensor, mask: torch.Tensor, mixed: torch.Tensor, rounded: _Round) -> torch.Tensor:
    """The rounded weight [R, C].

    `mixed` [C, C]: the upper Cholesky factor of the inverse Hessian; `rounded` maps a column [R] and its place to its values.
    """
    weight, found = weight.clone(), torch.zeros_like(weight)
    count = weight.shape[1]
    for start in range(0, count, _BLOCK):
        end = min(start + _BLOCK, count)
        lost = torch.empty(weight.shape[0], end - start)
        for j in range(start, end):
            column = weight[:, j] * mask[:, j]
            found[:, j] = rounded(column, j) * mask[:, j]
            lost[:, j - start] = (column - found[:, j]) / mixed[j, j]
            weight[:, j + 1 : end] -= torch.outer(lost[:, j - start], mixed[j, j + 1 : end])
        weight[:, end:] -= lost @ mixed[start:end, end:]
    return found


def _inverse_root(hessian: torch.Tensor) -> torch.Tensor:
    """Upper R with R^T R = (H + damping)^-1. An input that was never seen counts as one of the mean size."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    mean = diagonal.mean().clamp_min(1e-30)
    diagonal[diagonal == 0] = mean
    diagonal += _DAMPING * mean
    root: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return root.float()


def _step(values: torch.Tensor, width: int) -> float:
    _, step = round_columns(values.numpy(), np.array([len(values)], dtype=np.int32), width)
    return float(step[0])


def _mask(rows: npt.NDArray[np.int32], keep: npt.NDArray[np.int32], height: int) -> torch.Tensor:
    mask = torch.zeros(len(keep), height)
    mask[np.repeat(np.arange(len(keep)), keep), rows] = 1
    return mask


def _packed(codes: npt.NDArray[np.int8], mask: torch.Tensor, rank: int) -> npt.NDArray[np.uint8]:
    """Kept codes of [r, height], row after row, each group of rows by itself."""
    kept, packed, row = mask.numpy().astype(bool), [], 0
    for rows, width in column_groups(rank):
        inside = slice(row, row + rows)
        packed.append(pack(codes[inside][kept[inside]], width))
        row += rows
    return np.concatenate(packed)
