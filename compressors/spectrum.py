"""The singular triples of a delta, the largest first. Only those that are asked for are made: most of them are kept nowhere."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

_BLURRED = 4e-3  # of the largest singular value: squares in fp32 tell values apart down to here
_BLOCK = 96  # triples made at once; their number changes no bit of any of them
_STRIPE = 192  # columns of the Gram matrix at once: what is above its diagonal is not computed but for the stripes' own
_FEW = 64  # columns of the subspace for the first triples; from four times as many on it is faster than all of them
_DEGREE = 5  # of the filter: a higher one spreads the columns' lengths beyond what fp32 holds apart
_PASSES = 5
_ENOUGH = 0.75  # share of the subspace's columns that have settled
_SETTLED = 2e-4  # residual of an eigenvector, of its eigenvalue: what LAPACK leaves of a middling one in fp32


class TooFewTriplesError(Exception):
    """More triples are needed than were made; it never leaves compressors/methods.py."""


@dataclass(frozen=True)
class Triples:
    """The r largest: D is about u diag(s) vt. Each u's largest entry is positive."""

    u: torch.Tensor  # [m, r]
    s: torch.Tensor  # [r]
    vt: torch.Tensor  # [r, n]


@dataclass
class Spectrum:
    """Of a delta D [m, n], N = min(m, n): see `decompose`. Belongs to one thread.

    `s` [N] descends. `inner` [N, K]: singular vectors of the shorter side in columns, of the K largest values; where K < N the
    other values stand as the K-th, which is as much as they can be. `tall`: D, or its transpose where it is wide. `exact`: `s`
    comes from an SVD; else the K values, or half of them where K = N, are well above zero, and the least ones are blurred.
    """

    s: torch.Tensor
    inner: torch.Tensor
    tall: torch.Tensor
    wide: bool
    exact: bool = False
    _made: list[Triples] = field(default_factory=list)  # blocks

    def leading(self, rank: int) -> Triples:
        """The first `rank` triples; their `s` are exact. The same numbers whatever was asked for before.

        Raises TooFewTriplesError where not all are known, or all that are: the next value may then be as large.
        """
        if self.inner.shape[1] < len(self.s) and rank >= self.inner.shape[1]:
            raise TooFewTriplesError(f"{rank} triples are kept, {self.inner.shape[1]} known")
        while len(self._made) * _BLOCK < rank:
            self._made.append(self._block(len(self._made) * _BLOCK))
        blocks = self._made[: max(1, -(-rank // _BLOCK))]
        return Triples(
            torch.cat([one.u for one in blocks], dim=1)[:, :rank],
            torch.cat([one.s for one in blocks])[:rank],
            torch.cat([one.vt for one in blocks])[:rank],
        )

    @property
    def true_rank(self) -> int:
        """Singular values above what fp32 can tell from zero."""
        s = self.s if self.exact else self.leading(len(self.s)).s
        tolerance = s[0] * self.tall.shape[0] * torch.finfo(torch.float32).eps
        return int((s > tolerance).sum())

    def within(self, rank: int) -> bool:
        """Whether the true rank is at most so much. Raises TooFewTriplesError."""
        if self.inner.shape[1] < len(self.s):
            if rank >= self.inner.shape[1]:
                raise TooFewTriplesError(f"a rank of {rank} is asked about, {self.inner.shape[1]} triples are known")
            return False
        return (self.exact or rank > len(self.s) // 2) and self.true_rank <= rank

    @property
    def told_apart(self) -> torch.Tensor:
        """The singular values without those that are zero."""
        return self.s[: self.true_rank] if self.exact else self.s[self.s > 0]

    def _block(self, start: int) -> Triples:
        """Vectors of the longer side from those of the shorter one, v, and D v, whose length is the singular value."""
        inner = self.inner[:, start : start + _BLOCK]
        outer = self.tall @ inner
        s = outer.norm(dim=0)
        outer /= s.clamp(min=torch.finfo(torch.float32).tiny)
        u, v = (inner, outer) if self.wide else (outer, inner)
        largest = u.gather(0, u.abs().argmax(0, keepdim=True))[0]
        sign = torch.where(largest < 0, -1.0, 1.0)
        return Triples(u * sign, s, (v * sign).T)


def decompose(delta: torch.Tensor, lower: torch.Tensor | None = None) -> Spectrum:
    """Spectrum of a delta [m, n] in fp32. `lower`: what `gram` gives of it, where that is known.

    From the eigenvectors V of D^T D (of the shorter side): a third of the time of LAPACK's SVD. V is orthogonal to fp32's
    precision, so D = (D V) V^T holds to it too, and the values are the lengths of D V; what the squares blur is only how the least
    values are told apart. Where that is the question, as in a matrix of low rank, it is the SVD.
    """
    tall, wide = _upright(delta)
    values, vectors = torch.linalg.eigh(gram(delta) if lower is None else lower)
    s = values.flip(0).clamp(min=0).sqrt()
    if s[len(s) // 2] > _BLURRED * s[0]:
        return Spectrum(s, vectors.flip(1), tall, wide)
    _, s, inner_t = torch.linalg.svd(tall, full_matrices=False)
    return Spectrum(s, inner_t.T, tall, wide, exact=True)


def decompose_first(delta: torch.Tensor, lower: torch.Tensor) -> Spectrum | None:
    """The first triples of a delta [m, n], as exact as those of `decompose`, in half of its time; None where they do not settle.

    `lower`: what `gram` gives of it. Subspace iteration with Chebyshev's polynomials as filter (Zhou, Saad, Tiago and Chelikowsky
    2006): what lies below the subspace's least Ritz value is damped, what lies above it grows with the distance.
    """
    tall, wide = _upright(delta)
    count = tall.shape[1]
    if count < 4 * _FEW:
        return None
    square = lower.tril() + lower.tril(-1).T
    start = torch.randn(count, _FEW, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(square @ start)[0]
    for _ in range(_PASSES):
        image = square @ basis
        values, turn = torch.linalg.eigh(basis.T @ image)
        if values[0] <= _BLURRED**2 * values[-1]:
            return None
        basis, image = basis @ turn, image @ turn
        residual = (image - basis * values).norm(dim=0) / values
        settled = int((residual.flip(0) > _SETTLED).to(torch.uint8).argmax()) if residual.max() > _SETTLED else _FEW
        if settled >= _ENOUGH * _FEW:
            s = values.flip(0)[:settled].sqrt()
            return Spectrum(torch.cat([s, s[-1].expand(count - settled)]), basis.flip(1)[:, :settled], tall, wide)
        basis = torch.linalg.qr(_filtered(square, basis, image, values))[0]
    return None


def _filtered(square: torch.Tensor, basis: torch.Tensor, image: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Chebyshev's polynomial of the Gram matrix, of `_DEGREE`, on the basis [N, K]; scaled to 1 at the largest Ritz value.

    `image`: the Gram matrix times the basis; `values` [K]: the Ritz values, ascending. The interval [0, least] is damped.
    """
    centre = half = float(values[0]) / 2
    scale = first = half / (float(values[-1]) - centre)
    before, now = basis, (image - centre * basis) * (first / half)
    for _ in range(2, _DEGREE + 1):
        after = 1 / (2 / first - scale)
        before, now = now, (square @ now - centre * now) * (2 * after / half) - before * (scale * after)
        scale = after
    return now


def gram(delta: torch.Tensor) -> torch.Tensor:
    """D^T D of the shorter side of a delta, its lower triangle only: what stands above the diagonal means nothing."""
    tall, _ = _upright(delta)
    count = tall.shape[1]
    found = torch.zeros(count, count)
    for start in range(0, count, _STRIPE):
        end = min(start + _STRIPE, count)
        found[start:, start:end] = tall[:, start:].T @ tall[:, start:end]
    return found


def _upright(delta: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """A delta in fp32 with its shorter side in columns; whether it had to be turned for that."""
    wide = delta.shape[0] < delta.shape[1]
    return (delta.float().T if wide else delta.float()), wide
