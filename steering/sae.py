"""Sparse autoencoders of the residual stream, of the four architectures that are published, in one class.

Encoders (x is the normalised row, s = x - b_dec where the SAE subtracts it, p = s W_enc + b_enc):
    standard  relu(p)            jumprelu  relu(p) * (p > threshold)            topk  the k largest of relu(p), the rest 0
    gated     (s W_enc + b_gate > 0) * relu(s (W_enc exp(r_mag)) + b_mag)
Decoder: z W_dec + b_dec, then the normalisation is undone. Conventions follow SAELens 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from steering.errors import SAEFormatError, SAEMismatchError
from steering.latents import InputNorm, LatentRows, fold, normalise, undo_factor

Architecture = Literal["standard", "topk", "jumprelu", "gated"]
Normalize = Literal["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"]
NORM_OF: dict[str, InputNorm] = {"constant_norm_rescale": "constant_norm", "layer_norm": "layer_norm"}
WARN_FVU, REFUSE_FVU = 0.5, 1.0
# One value per latent, beside the encoder's and decoder's rows.
VECTORS: dict[str, tuple[str, ...]] = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}


@dataclass(frozen=True)
class Hook:
    """Where the stream is read: after (`resid_post`) decoder layer `layer`, counted from 0."""

    layer: int
    point: str = "resid_post"


@dataclass
class SAE:
    """`w_enc` [d, n], `b_enc` [n] (gated: None), `w_dec` [n, d], `b_dec` [d], all fp32.

    `scale`: constant that rows are multiplied by first (`expected_average_only_in`). `k`: the topk architecture's.
    `maxima` [n]: the largest activation of each latent where it was measured (0: it never fired), where that is known. Raises
    SAEFormatError on creation when shapes do not fit, a tensor is missing or a value is not finite.
    """

    w_enc: torch.Tensor
    w_dec: torch.Tensor
    b_dec: torch.Tensor
    architecture: Architecture
    hook: Hook
    b_enc: torch.Tensor | None = None
    threshold: torch.Tensor | None = None
    b_gate: torch.Tensor | None = None
    b_mag: torch.Tensor | None = None
    r_mag: torch.Tensor | None = None
    k: int | None = None
    subtract_b_dec: bool = True
    normalize: Normalize = "none"
    scale: float | None = None
    rescale_by_decoder_norm: bool = False
    maxima: torch.Tensor | None = None
    model_name: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def d_in(self) -> int:
        return self.w_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return self.w_dec.shape[0]

    @property
    def input_norm(self) -> InputNorm:
        return NORM_OF.get(self.normalize, "none")

    def encode(self, h: torch.Tensor) -> torch.Tensor:
        """Latents [T, n] of stream rows [T, d], with the top-k step where the architecture has one."""
        z = self.latents(h)
        if self.architecture != "topk":
            return z
        assert self.k is not None
        ranked = z * self._decoder_norm() if self.rescale_by_decoder_norm else z
        index = ranked.topk(min(self.k, self.d_sae), dim=-1, sorted=False).indices
        return torch.zeros_like(z).scatter_(-1, index, z.gather(-1, index))

    def latents(self, h: torch.Tensor) -> torch.Tensor:
        """Latents [T, n] without a top-k step: what SpARE collects, selects and edits."""
        s = self._read(h.float())
        if self.architecture == "gated":
            p = s @ self.w_enc
            magnitude = (p * self._tensor("r_mag").exp() + self._tensor("b_mag")).relu()
            return torch.where(p + self._tensor("b_gate") > 0, magnitude, 0.0)
        p = torch.addmm(self._tensor("b_enc"), s, self.w_enc)
        if self.architecture == "jumprelu":
            p = torch.where(p > self._tensor("threshold"), p, 0.0)
        return p.relu_()

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Rows [T, d] of latents [T, n], before a per-row normalisation is undone (`reconstruct` does both)."""
        x = torch.addmm(self.b_dec, z, self.w_dec)
        return x / self.scale if self.scale is not None else x

    def reconstruct(self, h: torch.Tensor) -> torch.Tensor:
        """What the SAE makes of stream rows [T, d]."""
        h = h.float()
        x = self.decode(self.encode(h))
        if self.input_norm == "none":
            return x
        x = x * undo_factor(h, self.input_norm)
        return x + h.mean(-1, keepdim=True) if self.input_norm == "layer_norm" else x

    def rows(self, ids: Sequence[int] | torch.Tensor) -> LatentRows:
        """The latents `ids` on their own; raises SAEMismatchError for an id that the SAE does not have."""
        index = latent_index(ids, self.d_sae)
        return fold(
            index,
            self.w_enc.T[index],
            self.w_dec[index],
            {name: self._tensor(name)[index] for name in VECTORS[self.architecture]},
            self.b_dec if self.subtract_b_dec else None,
            1.0 if self.scale is None else self.scale,
            self.input_norm,
        )

    def _read(self, h: torch.Tensor) -> torch.Tensor:
        x = normalise(h, self.input_norm)
        if self.scale is not None:
            x = x * self.scale
        return x - self.b_dec if self.subtract_b_dec else x

    def _decoder_norm(self) -> torch.Tensor:
        norm: torch.Tensor = self.w_dec.norm(dim=1)
        return norm

    def _tensor(self, name: str) -> torch.Tensor:
        found: torch.Tensor = getattr(self, name)
        return found


@dataclass(frozen=True)
class SAECheck:
    """`fvu`: sum ||x - x_hat||^2 / sum ||x - mean||^2; `l0`: latents that fire per row; `verdict`: ok or warn."""

    fvu: float
    l0: float
    dead_share: float
    verdict: Literal["ok", "warn"]


def check_sae(sae: SAE, activations: torch.Tensor) -> SAECheck:
    """Reconstruct stream rows [N, d] of the SAE's own layer, taken without position 0.

    A wrong layer, normalisation or bias convention shows as nonsense. Raises SAEMismatchError for another width, and when the
    reconstruction is no better than the mean (FVU above 1).
    """
    if activations.dim() != 2 or activations.shape[1] != sae.d_in:
        raise SAEMismatchError(
            f"the SAE reads rows of width {sae.d_in}, the activations have shape {list(activations.shape)}"
        )
    squared = active = 0.0
    fired = torch.zeros(sae.d_sae, dtype=torch.bool)
    for rows in torch.split(activations.float(), 512):
        squared += float((rows - sae.reconstruct(rows)).square().sum())
        z = sae.encode(rows)
        active += float((z > 0).sum())
        fired |= (z > 0).any(0)
    fvu = squared / float((activations - activations.float().mean(0)).square().sum())
    if not fvu <= REFUSE_FVU:
        raise SAEMismatchError(
            f"the SAE does not fit these activations: FVU {fvu:.2f} is worse than their mean; "
            "is it the right model, layer and normalisation?"
        )
    verdict: Literal["ok", "warn"] = "warn" if fvu > WARN_FVU else "ok"
    return SAECheck(fvu, active / len(activations), float((~fired).float().mean()), verdict)


def latent_index(ids: Sequence[int] | torch.Tensor, count: int) -> torch.Tensor:
    """Latent ids as int64 [k]; raises SAEMismatchError for one that is not below `count`."""
    index = torch.as_tensor(ids, dtype=torch.int64)
    outside = index[(index < 0) | (index >= count)]
    if len(outside):
        raise SAEMismatchError(f"latent {int(outside[0])} is not within the SAE's 0 to {count - 1}")
    return index


def _check(sae: SAE) -> None:
    if sae.architecture not in VECTORS:
        raise SAEFormatError(f"architecture {sae.architecture!r} is not one of {', '.join(VECTORS)}")
    if sae.normalize not in (*NORM_OF, "none", "expected_average_only_in"):
        raise SAEFormatError(f"normalize_activations {sae.normalize!r} is not supported")
    if sae.w_dec.dim() != 2:
        raise SAEFormatError(f"W_dec has shape {list(sae.w_dec.shape)}, not [latents, width]")
    n, d = sae.w_dec.shape
    shapes = {"w_enc": (d, n), "w_dec": (n, d), "b_dec": (d,)} | dict.fromkeys(VECTORS[sae.architecture], (n,))
    if sae.maxima is not None:
        shapes["maxima"] = (n,)
    for name, shape in shapes.items():
        tensor = getattr(sae, name)
        if tensor is None:
            raise SAEFormatError(f"an SAE of architecture {sae.architecture} needs {name}")
        if tuple(tensor.shape) != shape:
            raise SAEFormatError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise SAEFormatError(f"{name} has values that are not finite")
    if sae.maxima is not None and bool((sae.maxima < 0).any()):
        raise SAEFormatError("maxima has values below 0, which no latent reaches")
    if sae.architecture == "topk" and not (sae.k and sae.k > 0):
        raise SAEFormatError("an SAE of architecture topk needs k, a positive number")
    if sae.normalize == "expected_average_only_in" and not (sae.scale and sae.scale > 0):
        raise SAEFormatError("normalize_activations expected_average_only_in needs its scaling factor")
