"""An SAE as one safetensors file, the form that is uploaded to a server: memory-mapped, so that only chosen latents are read.

    W_enc [n, d], W_dec [n, d]      a row per latent, W_enc transposed against SAELens: a gather touches k rows of the file
    b_dec [d]                       b_enc [n], threshold [n] | b_gate, b_mag, r_mag [n], as the architecture needs them
    max [n]                         the largest activation of each latent, fp32; only where it is known

The metadata's `deltaworks.sae` is the header (steering/header.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from steering.errors import SAEFormatError, SAEMismatchError
from steering.header import MAXIMA, SAE_KEY, SAEHeader, metadata_of, read_sae_header
from steering.latents import LatentRows, fold
from steering.sae import NORM_OF, SAE, VECTORS, Hook, latent_index

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHECKED_ROWS = 4096  # read at a time


@dataclass(frozen=True)
class PackedSAE:
    """An opened one-file SAE; its tensors view the mapped file."""

    header: SAEHeader
    tensors: Mapping[str, torch.Tensor]

    @property
    def hook(self) -> Hook:
        return Hook(self.header.hook_layer, self.header.hook_point)

    @property
    def d_in(self) -> int:
        return self.header.d_in

    @property
    def d_sae(self) -> int:
        return self.header.d_sae

    def rows(self, ids: Sequence[int] | torch.Tensor) -> LatentRows:
        """The latents `ids` on their own, fp32; raises SAEMismatchError for an id that the SAE does not have."""
        index = latent_index(ids, self.d_sae)
        header = self.header
        return fold(
            index,
            self.tensors["W_enc"][index],
            self.tensors["W_dec"][index],
            {name: self.tensors[name][index] for name in VECTORS[header.architecture]},
            self.tensors["b_dec"] if header.subtract_b_dec else None,
            1.0 if header.scale is None else header.scale,
            NORM_OF.get(header.normalize, "none"),
        )

    def load(self) -> SAE:
        """The whole SAE in fp32. Raises SAEFormatError for values that are not finite."""
        header = self.header
        return SAE(
            w_enc=self.tensors["W_enc"].float().T.contiguous(),
            w_dec=self.tensors["W_dec"].float(),
            b_dec=self.tensors["b_dec"].float(),
            architecture=header.architecture,
            hook=self.hook,
            k=header.k,
            subtract_b_dec=header.subtract_b_dec,
            normalize=header.normalize,
            scale=header.scale,
            rescale_by_decoder_norm=header.rescale_by_decoder_norm,
            maxima=self.tensors.get(MAXIMA),
            model_name=header.model_name,
            metadata={"base_fingerprint": header.base_fingerprint} if header.base_fingerprint else {},
            **{name: self.tensors[name].float() for name in VECTORS[header.architecture]},
        )


def pack_sae(sae: SAE, file: Path, dtype: torch.dtype = torch.float32) -> SAEHeader:
    """Write an SAE as one file; equal SAEs give equal bytes. `dtype` of the two matrices: fp32, bf16 or fp16.

    The base's fingerprint is taken from `sae.metadata["base_fingerprint"]`, where training leaves it.
    """
    if dtype not in _DTYPES:
        raise SAEFormatError(f"an SAE is stored in fp32, bf16 or fp16, not {dtype}")
    fingerprint = sae.metadata.get("base_fingerprint")
    header = SAEHeader(
        architecture=sae.architecture,
        hook_layer=sae.hook.layer,
        normalize=sae.normalize,
        scale=sae.scale,
        k=sae.k,
        subtract_b_dec=sae.subtract_b_dec,
        rescale_by_decoder_norm=sae.rescale_by_decoder_norm,
        model_name=sae.model_name,
        base_fingerprint=fingerprint if isinstance(fingerprint, str) else None,
        d_in=sae.d_in,
        d_sae=sae.d_sae,
    )
    tensors = {"W_enc": sae.w_enc.T.to(dtype), "W_dec": sae.w_dec.to(dtype), "b_dec": sae.b_dec.float()}
    tensors |= {name: getattr(sae, name).float() for name in VECTORS[sae.architecture]}
    if sae.maxima is not None:
        tensors[MAXIMA] = sae.maxima.float()
    temporary = file.with_name(file.name + ".tmp")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata=metadata_of(SAE_KEY, header))
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return header


def open_sae(file: Path) -> PackedSAE:
    """Map a one-file SAE. Raises SAEFormatError for another kind of file and for wrong tensors; values are not read yet."""
    header = read_sae_header(file)
    try:
        tensors = load_file(file)  # views of the mapped file
    except (OSError, SafetensorError) as error:
        raise SAEFormatError(f"{file.name} cannot be read: {error}") from error
    d, n = header.d_in, header.d_sae
    shapes = {"W_enc": (n, d), "W_dec": (n, d), "b_dec": (d,)} | dict.fromkeys(VECTORS[header.architecture], (n,))
    if MAXIMA in tensors:
        shapes[MAXIMA] = (n,)
    if tensors.keys() != shapes.keys():
        raise SAEFormatError(
            f"an SAE of architecture {header.architecture} holds {', '.join(shapes)}, not {[*tensors]}"
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape or tensors[name].dtype not in _DTYPES:
            found = f"{list(tensors[name].shape)} in {tensors[name].dtype}"
            raise SAEFormatError(f"{name} is {found}; the header says {list(shape)}, in fp32, bf16 or fp16")
    if MAXIMA in tensors and tensors[MAXIMA].dtype != torch.float32:  # single values are read without torch
        raise SAEFormatError(f"{MAXIMA} is stored in {tensors[MAXIMA].dtype}, not in fp32")
    if header.architecture == "topk" and header.k is None:
        raise SAEFormatError("the header of an SAE of architecture topk needs k")
    if (header.scale is None) != (header.normalize != "expected_average_only_in"):
        raise SAEFormatError("the header's scale goes with normalize expected_average_only_in, and only with it")
    return PackedSAE(header, tensors)


def check_sae_file(file: Path, base_fingerprint: str | None, d_in: int, num_layers: int) -> SAEHeader:
    """The check of an upload: the whole file, against the running base.

    An SAE that does not say its base passes; `base_fingerprint` None skips that comparison. Raises SAEFormatError for what the file
    is, SAEMismatchError for what it does not fit.
    """
    packed = open_sae(file)
    header = packed.header
    for name, tensor in packed.tensors.items():
        if not all(bool(torch.isfinite(rows).all()) for rows in torch.split(tensor, _CHECKED_ROWS)):
            raise SAEFormatError(f"{name} has values that are not finite")
    if MAXIMA in packed.tensors and bool((packed.tensors[MAXIMA] < 0).any()):
        raise SAEFormatError(f"{MAXIMA} has values below 0, which no latent reaches")
    if header.d_in != d_in:
        raise SAEMismatchError(f"the SAE reads streams of width {header.d_in}, the base's have {d_in}")
    if header.hook_layer >= num_layers:
        raise SAEMismatchError(f"the SAE reads layer {header.hook_layer}, the base has layers 0 to {num_layers - 1}")
    if base_fingerprint is not None and header.base_fingerprint not in (None, base_fingerprint):
        raise SAEMismatchError(
            f"the SAE was trained on another base ({header.model_name}, {header.base_fingerprint:.19}...), "
            f"this server runs {base_fingerprint:.19}..."
        )
    return header
