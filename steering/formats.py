"""SAEs on the disk: folders that other libraries wrote, and the folder that we write (SAELens v6).

Read at run time: SAELens folders (v6 and older), EleutherAI sparsify folders, Gemma Scope `params.npz`, and our one-file form
(steering/packed.py). Nothing here unpickles: `.pt` and `.pth` files go through `deltaworks steer sae convert` first.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from steering.errors import SAEFormatError
from steering.packed import PackedSAE, check_sae_file, open_sae, pack_sae
from steering.sae import SAE, Hook, Normalize

__all__ = ["PackedSAE", "check_sae_file", "load_sae", "open_sae", "pack_sae", "save_saelens"]
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_GATE = ("b_gate", "b_mag", "r_mag")
_MAXIMA = "maxima.safetensors"  # ours, beside what SAELens writes: the tensor `maxima` [n]
_BOOL_NORM = {False: "none", True: "expected_average_only_in"}
_HF_POINT = re.compile(r"(?:^|\.)layers\.(\d+)$")
_TL_POINT = re.compile(r"^blocks\.(\d+)\.hook_resid_(post|pre)$")


def load_sae(path: Path) -> SAE:
    """An SAE from a SAELens or sparsify folder, Gemma Scope's `params.npz` or the folder that holds it, or a one-file SAE.

    Raises SAEFormatError naming the file and what is wrong with it.
    """
    if path.suffix in _PICKLES or (
        path.is_dir() and not _known(path) and any(p.suffix in _PICKLES for p in path.iterdir())
    ):
        raise SAEFormatError(
            f"{path} is a pickle, which is never loaded; turn it into a folder with `deltaworks steer sae convert`"
        )
    if path.is_file() and path.suffix == ".npz":
        return _gemma_scope(path)
    if path.is_file() and path.suffix == ".safetensors":
        return open_sae(path).load()
    if path.is_dir():
        if (path / "sae_weights.safetensors").is_file():
            return _saelens(path)
        if (path / "sae.safetensors").is_file():
            return _sparsify(path)
        if (path / "params.npz").is_file():
            return _gemma_scope(path / "params.npz")
    raise SAEFormatError(
        f"{path} is no SAE: expected a folder with sae_weights.safetensors (SAELens) or sae.safetensors (sparsify), "
        "a params.npz (Gemma Scope), or one file of ours"
    )


def save_saelens(sae: SAE, folder: Path) -> None:
    """Write a SAELens v6 folder: `cfg.json` and `sae_weights.safetensors`. sae-lens loads it and reconstructs the same.

    The largest activation of each latent goes into a file of its own, `maxima.safetensors`, where it is known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_b_dec,
        "normalize_activations": sae.normalize,
        "reshape_activations": "none",
        "metadata": sae.metadata
        | {
            "model_name": sae.model_name,
            "hook_name": f"blocks.{sae.hook.layer}.hook_{sae.hook.point}",
            "hf_hook_name": f"model.layers.{sae.hook.layer}",
            "hook_head_index": None,
            "prepend_bos": False,
            "sae_lens_version": "6.0.0",
        },
    }
    if sae.architecture == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": sae.rescale_by_decoder_norm}
    scale = sae.scale or 1.0  # a constant scale is folded into the weights
    config["normalize_activations"] = "none" if sae.scale is not None else sae.normalize
    tensors = {"W_enc": sae.w_enc * scale, "W_dec": sae.w_dec / scale, "b_dec": sae.b_dec / scale}
    tensors |= {name: tensor for name in ("b_enc", "threshold", *_GATE) if (tensor := getattr(sae, name)) is not None}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if sae.maxima is not None:
        save_file({"maxima": sae.maxima.contiguous()}, folder / _MAXIMA)
    else:
        (folder / _MAXIMA).unlink(missing_ok=True)  # of an SAE that was here before


def _known(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("sae_weights.safetensors", "sae.safetensors", "params.npz"))


def _saelens(folder: Path) -> SAE:
    config = _config(folder)
    metadata = dict(config.get("metadata") or {})
    flat = config | {key: value for key, value in metadata.items() if key not in config}
    architecture = flat.get("architecture", "standard")
    activation = flat.get("activation_fn", flat.get("activation_fn_str", "relu"))
    k = flat.get("k")
    if activation == "topk" and architecture == "standard":
        architecture, k = "topk", (flat.get("activation_fn_kwargs") or {}).get("k")
    elif activation != "relu" and architecture == "standard":
        raise SAEFormatError(f"{folder}/cfg.json: activation_fn {activation!r} is not one of relu, topk")
    if architecture not in ("standard", "topk", "jumprelu", "gated"):
        raise SAEFormatError(
            f"{folder}/cfg.json: architecture {architecture!r} is not one of standard, topk, jumprelu, gated"
        )
    if flat.get("reshape_activations", "none") not in (None, "none"):
        raise SAEFormatError(f"{folder}/cfg.json: reshape_activations {flat['reshape_activations']!r} is not supported")
    normalize = flat.get("normalize_activations", "none") or "none"
    normalize = _BOOL_NORM.get(normalize, normalize) if isinstance(normalize, bool) else normalize
    tensors = _tensors(folder / "sae_weights.safetensors")
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not bool((factor == 1).all()):
        tensors["W_dec"] = _tensor(tensors, "W_dec", folder) * factor[:, None]
    scale = flat.get("activation_norm_scaling_factor", metadata.get("activation_norm_scaling_factor"))
    return SAE(
        w_enc=_tensor(tensors, "W_enc", folder),
        w_dec=_tensor(tensors, "W_dec", folder),
        b_dec=_tensor(tensors, "b_dec", folder),
        b_enc=tensors.get("b_enc"),
        threshold=tensors.get("threshold"),
        b_gate=tensors.get("b_gate"),
        b_mag=tensors.get("b_mag"),
        r_mag=tensors.get("r_mag"),
        architecture=architecture,
        k=k,
        hook=_hook(flat, folder),
        subtract_b_dec=bool(flat.get("apply_b_dec_to_input", True)),
        normalize=cast(Normalize, normalize),  # checked by SAE itself
        scale=float(scale) if normalize == "expected_average_only_in" and scale is not None else None,
        rescale_by_decoder_norm=bool(flat.get("rescale_acts_by_decoder_norm", False)),
        maxima=_tensor(_tensors(folder / _MAXIMA), "maxima", folder / _MAXIMA)
        if (folder / _MAXIMA).is_file()
        else None,
        model_name=str(flat.get("model_name") or ""),
        metadata=metadata,
    )


def _sparsify(folder: Path) -> SAE:
    config = _config(folder)
    if config.get("activation", "topk") != "topk":
        raise SAEFormatError(f"{folder}/cfg.json: activation {config['activation']!r} is not supported, only topk")
    for name in ("transcode", "skip_connection", "signed"):
        if config.get(name):
            raise SAEFormatError(
                f"{folder}/cfg.json: {name} is not supported; a transcoder reads another stream than it writes"
            )
    tensors = _tensors(folder / "sae.safetensors")
    layer = _HF_POINT.search(folder.name)
    if layer is None:
        raise SAEFormatError(
            f"{folder}: the folder's name must say the hook, as in layers.15 (a decoder layer's output)"
        )
    return SAE(
        w_enc=_tensor(tensors, "encoder.weight", folder).T.contiguous(),
        b_enc=_tensor(tensors, "encoder.bias", folder),
        w_dec=_tensor(tensors, "W_dec", folder),
        b_dec=_tensor(tensors, "b_dec", folder),
        architecture="topk",
        k=config.get("k", 32),
        hook=Hook(int(layer[1])),
        metadata={"format": "sparsify"},
    )


def _gemma_scope(path: Path) -> SAE:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            found = {name.lower(): torch.from_numpy(np.asarray(file[name])).float() for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise SAEFormatError(f"{path} cannot be read as Gemma Scope's params.npz: {error}") from error
    layers = [part for part in path.parts if re.fullmatch(r"layer_\d+", part)]
    if not layers:
        raise SAEFormatError(f"{path}: the path must hold layer_<number>, as Gemma Scope's folders do")
    return SAE(
        w_enc=_tensor(found, "w_enc", path),
        b_enc=_tensor(found, "b_enc", path),
        w_dec=_tensor(found, "w_dec", path),
        b_dec=_tensor(found, "b_dec", path),
        threshold=_tensor(found, "threshold", path),
        architecture="jumprelu",
        hook=Hook(int(layers[-1].removeprefix("layer_"))),
        subtract_b_dec=False,
        metadata={"format": "gemma-scope"},
    )


def _hook(config: dict[str, Any], folder: Path) -> Hook:
    name = str(config.get("hook_name") or config.get("hook_point") or "")
    if found := _TL_POINT.match(name):
        layer = int(found[1]) - (found[2] == "pre")
        if layer >= 0:
            return Hook(layer)
    if found := _HF_POINT.search(name):
        return Hook(int(found[1]))
    raise SAEFormatError(
        f"{folder}/cfg.json: hook {name!r} is not the residual stream after a layer (blocks.<L>.hook_resid_post)"
    )


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SAEFormatError(f"{folder}/cfg.json cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise SAEFormatError(f"{folder}/cfg.json is not an object")
    return found


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise SAEFormatError(f"{path} cannot be read: {error}") from error


def _tensor(tensors: dict[str, torch.Tensor], name: str, path: Path) -> torch.Tensor:
    if name not in tensors:
        raise SAEFormatError(f"{path} lacks the tensor {name}; it holds {', '.join(sorted(tensors))}")
    return tensors[name]
