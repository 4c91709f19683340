"""A PEFT LoRA folder into a delta file: each pair (A, B) becomes a `lowrank` record, equal to what PEFT adds.

W + s B A (Hu et al. 2021, eq. 3) with s = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023). The scale
is folded into B. Nothing is compressed, so nothing is lost. What cannot be told exactly is refused by name: DoRA, initialisations
that change the base (PiSSA and its like), LoRA on the token embedding, pickled weights.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from compressors.artifact import Array, Manifest, Ratios, version_for
from compressors.compress import store, tokenizer_info, vocabulary_rows
from compressors.encode import encode_raw, encode_rows
from compressors.errors import CheckpointError
from compressors.fingerprint import fingerprint
from compressors.layout import HEAD, Part, input_table, is_buffer, is_embedding, projection_parts
from compressors.pairing import tied_to
from compressors.ratios import Tally
from compressors.record import Encoded
from compressors.tensors import Checkpoint
from compressors.tokenizer import table_rows
from compressors.writer import ArtifactWriter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Options under which the folder means something else than W + s B A; false, null and empty are harmless.
_REFUSED = {
    "use_dora": "DoRA rescales the base's own weights",
    "use_qalora": "QALoRA pools its inputs",
    "layer_replication": "replicated layers are not in the base",
    "trainable_token_indices": "trained single tokens are stored in a form that is not read; train with modules_to_save",
    "target_parameters": "adapters on bare parameters are not read",
    "alora_invocation_tokens": "an activated LoRA changes only a part of each prompt",
    "lora_bias": "a bias inside the adapter is not read",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Scales:
    """Scale and rank of every module, as `adapter_config.json` says."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool

    def of(self, module: str) -> tuple[int, float]:
        """(rank, scale) of a module. A pattern is a regular expression for the end of its name, as in PEFT."""
        rank = int(_matching(self.rank_pattern, module, self.rank))
        alpha = float(_matching(self.alpha_pattern, module, self.alpha))
        return rank, alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def import_lora(
    folder: Path, base: Path, out: Path, name: str | None = None, rows_dtype: str = "fp16", progress: bool = False
) -> Manifest:
    """Write the LoRA in `folder`, trained on `base`, as the delta file `out`, which is whole or absent.

    `rows_dtype` is of vocabulary tables that were saved whole (`modules_to_save`). A LoRA names no weights of its base, so only
    shapes tell that it fits. Raises CheckpointError naming the option, module or tensor that does not fit.
    """
    config, tensors = _config(folder), _tensors(folder)
    scales = _scales(config)
    with Checkpoint(base) as old, ArtifactWriter(out) as writer:
        adapter = _named(tensors, old)
        _check_tying(adapter, old, config)
        records, tally = {}, Tally()
        names = [name for name in old.names if not is_buffer(name)]
        for parameter in tqdm(names, "importing", unit="tensor", disable=not progress):
            for encoded in _encoded(parameter, adapter, old, scales, rows_dtype):
                records[encoded.name] = store(writer, encoded)
                tally.add(encoded.name, encoded.shape, encoded.tied_to is not None, encoded.arrays)
        rows = table_rows(records)
        tuned = old.config if rows == vocabulary_rows(old) else {**old.config, "vocab_size": rows}
        tokenizer, files = tokenizer_info(old, folder, tuned, rows)
        for key, array in files.items():
            writer.add(key, array)
        manifest = Manifest(
            format_version=version_for(tokenizer),
            method="lora",
            base_fingerprint=fingerprint(base),
            base_name=name or base.name,
            architecture=str(next(iter(old.config.get("architectures") or []), "unknown")),
            ratio=tally.values_ratio or 1.0,
            beta=0.0,
            c=0.0,
            rule="exact",
            rescale="exact",
            value_dtype="fp16",
            mask="seeded",
            seed=0,
            ratios=Ratios(values=tally.values_ratio, projection_bytes=tally.bytes_ratio, whole_file=None),
            tokenizer=tokenizer,
            tool=f"deltaworks {importlib.metadata.version('deltaworks')}",
            tensors=records,
        )
        return writer.finish(manifest, tally.dense_bytes)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}; name the folder that PEFT's save_pretrained wrote")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else None
        raise CheckpointError(f"{file}: peft_type is {found!r}; only LORA is imported")
    for option, why in _REFUSED.items():
        if config.get(option):
            raise CheckpointError(f"{file}: {option} is set: {why}; merge the adapter and use `delta compress`")
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{file}: init_lora_weights is {init!r}, which changed the base's weights; save it converted to a plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return config


def _scales(config: Mapping[str, Any]) -> Scales:
    try:
        scales = Scales(
            int(config["r"]),
            float(config["lora_alpha"]),
            dict(config.get("rank_pattern") or {}),
            dict(config.get("alpha_pattern") or {}),
            bool(config.get("use_rslora")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{CONFIG}: r and lora_alpha must be numbers, and the patterns tables: {error}"
        ) from error
    if min(scales.rank, *scales.rank_pattern.values()) < 1 if scales.rank_pattern else scales.rank < 1:
        raise CheckpointError(f"{CONFIG}: r must be at least 1")
    return scales


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / WEIGHTS
    if not file.is_file():
        pickle = " (adapter_model.bin is a pickle, never loaded)" if (folder / "adapter_model.bin").exists() else ""
        raise CheckpointError(f"{folder} has no {WEIGHTS}{pickle}; save it with safe_serialization=True")
    try:
        tensors: dict[str, torch.Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise CheckpointError(f"{file}: {name} is not floating or holds NaN or infinite values")
    return tensors


def _named(tensors: Mapping[str, torch.Tensor], old: Checkpoint) -> dict[str, dict[str, torch.Tensor]]:
    """By parameter of the base: "a" and "b", or "whole". Raises CheckpointError for what the base or LoRA lacks."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        path = key.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        matched = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", path)
        parameter, role = (f"{matched[1]}.weight", matched[2].lower()) if matched else (path, "whole")
        if not matched and ".lora_" in path:
            raise CheckpointError(f"{key} is not a plain LoRA matrix (A or B of a linear layer) and cannot be imported")
        known = _in_base(parameter, old)
        if known is None:
            raise CheckpointError(f"{key}: the base {old.folder.name} has no parameter {parameter}; is this its base?")
        found.setdefault(known, {})[role] = tensor
    for parameter, roles in found.items():
        if set(roles) not in ({"a", "b"}, {"whole"}):
            raise CheckpointError(f"{parameter}: the adapter has only {', '.join(sorted(roles))} of its LoRA pair")
    return found


def _in_base(parameter: str, old: Checkpoint) -> str | None:
    """The base's name of a parameter; some checkpoints leave out the model's own prefix."""
    if parameter in old.tensors:
        return parameter
    short = parameter.partition(".")[2]
    if short in old.tensors:
        return short
    return HEAD if parameter == HEAD else None


def _check_tying(adapter: dict[str, dict[str, torch.Tensor]], old: Checkpoint, config: Mapping[str, Any]) -> None:
    """A tied table that was trained on one end only is two tables. Drops a head that repeats the trained table."""
    table = input_table(old.names)
    if table is None or not (HEAD not in old.tensors or tied_to(old, old, HEAD)):
        return
    head, trained = adapter.get(HEAD), adapter.get(table)
    if head is None and (trained is None or config.get("ensure_weight_tying")):
        return
    same = head is not None and trained is not None and "whole" in head.keys() & trained.keys()
    if not same or not torch.equal(head["whole"], trained["whole"]):  # type: ignore[index]  # `same` says that they are there
        raise CheckpointError(
            f"the base ties {HEAD} to {table}, and the adapter changes one of them alone or both differently; untie the base "
            "first, or train both with ensure_weight_tying"
        )
    del adapter[HEAD]


def _encoded(
    name: str, adapter: Mapping[str, dict[str, torch.Tensor]], old: Checkpoint, scales: Scales, rows_dtype: str
) -> list[Encoded]:
    shape = old.shape(name)
    found = adapter.get(name)
    if found is None and name == HEAD and (table := tied_to(old, old, name)):
        return [Encoded(name, "zero", shape, tied_to=table)]
    parts = projection_parts(name, shape, old.config)
    if found is None:
        return [Encoded(part.name, "zero", part.shape) for part in parts] or [Encoded(name, "zero", shape)]
    if "whole" not in found:
        if not parts or parts[0].expert is not None:
            raise CheckpointError(f"{name}: LoRA on this parameter is not served; only linear projections are")
        return [_pair(part, found["a"], found["b"], scales.of(name.removesuffix(".weight"))) for part in parts]
    whole = found["whole"]
    if whole.shape != shape and not (is_embedding(name) and whole.shape[1:] == shape[1:] and len(whole) > shape[0]):
        raise CheckpointError(f"{name} has shape {list(whole.shape)} in the adapter and {list(shape)} in the base")
    if is_embedding(name):
        return [encode_rows(name, old.finite(name), whole, rows_dtype)]
    if parts:
        raw = [(part, part.view(whole).float() - part.view(old.finite(name)).float()) for part in parts]
        return [_dense(part, delta) for part, delta in raw]
    return [encode_raw(name, old.finite(name), whole)]


def _pair(part: Part, a: torch.Tensor, b: torch.Tensor, expected: tuple[int, float]) -> Encoded:
    """A [r, in] and the rows of B [out, r] that belong to one matrix of the base."""
    rank, scale = expected
    if a.shape != (rank, part.shape[1]) or b.dim() != 2 or b.shape[1] != rank or b.shape[0] < part.end:
        raise CheckpointError(
            f"{part.name}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit the base's {list(part.shape)} "
            f"with rank {rank}; is this its base?"
        )
    scaled = b[part.start : part.end].float() * scale
    if not (a.any() and scaled.any()):
        return Encoded(part.name, "zero", part.shape)
    if rank > min(part.shape):
        return _dense(part, scaled @ a.float())
    arrays = {
        "a": _array(a),
        "b": _array(scaled.to(b.dtype) if torch.equal(scaled.to(b.dtype).float(), scaled) else scaled),
    }
    return Encoded(part.name, "lowrank", part.shape, arrays, rank)


def _dense(part: Part, delta: torch.Tensor) -> Encoded:
    if not delta.any():
        return Encoded(part.name, "zero", part.shape)
    return Encoded(part.name, "raw", part.shape, {"delta": _array(delta)})


def _array(values: torch.Tensor) -> Array:
    """As stored; bf16 as its uint16 bit patterns."""
    values = values.contiguous()
    array: Array = (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
    return array


def _matching(patterns: Mapping[str, Any], module: str, default: float) -> float:
    """The value of the first pattern that matches the end of the module's name."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        except re.error as error:
            raise CheckpointError(f"{CONFIG}: the pattern {pattern!r} is not a regular expression: {error}") from error
    return default
