"""A delta file back to dense: the reference of what a delta means, and checkpoints for tools that know nothing of deltas."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from compressors.artifact import Array, Artifact
from compressors.errors import ArtifactError, BaseMismatchError
from compressors.fingerprint import fingerprint
from compressors.layout import projection_parts
from compressors.masks import factor_rows, layer_seed
from compressors.tensors import Checkpoint

_SHARD_BYTES = 2 << 30
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def delta_tensor(artifact: Artifact, name: str) -> torch.Tensor:
    """The dense delta of one record, fp32, in the record's shape; "rows" gives added rows whole.

    impart: sum_k coef[k] * U[:, k] V[:, k]^T with the kept values at the rows that the seed names.
    """
    record = artifact.records[name]
    if record.kind == "zero":
        return torch.zeros(record.shape)
    if record.kind == "raw":
        return _floats(artifact, f"{name}::delta").reshape(record.shape)
    if record.kind == "lowrank":
        return _floats(artifact, f"{name}::b") @ _floats(artifact, f"{name}::a")
    if record.kind == "rows":
        dense = torch.zeros(record.shape)
        dense[torch.from_numpy(artifact.array(f"{name}::row_idx").astype(np.int64))] = _floats(
            artifact, f"{name}::row_delta"
        )
        return dense
    seed = layer_seed(artifact.manifest.seed, name)
    factors = []
    for f, (label, rows) in enumerate(zip("uv", record.shape, strict=True)):
        keep = artifact.array(f"{name}::keep_{label}").astype(np.int32)
        dense = torch.zeros(rows, len(keep))
        columns = np.repeat(np.arange(len(keep)), keep)
        dense[factor_rows(seed, f, rows, keep), columns] = _floats(artifact, f"{name}::{label}_vals")
        factors.append(dense)
    coef = torch.from_numpy(artifact.array(f"{name}::coef").copy())
    return (factors[0] * coef) @ factors[1].T


def decompress(artifact_path: Path, base: Path, out: Path, dtype: str = "bf16", progress: bool = False) -> None:
    """Write base + delta as a Hugging Face folder `out`, which must not exist yet.

    `dtype`: fp32, bf16 or fp16. bf16 rounds the sum, which costs about 1 % of a typical delta; the gateway does not.
    Raises BaseMismatchError, ArtifactError, CheckpointError; `out` is whole or absent.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; name a new folder")
    with Artifact.open(artifact_path) as artifact, Checkpoint(base) as old:
        found = fingerprint(base)
        if found != artifact.manifest.base_fingerprint:
            raise BaseMismatchError(
                f"{artifact_path.name} belongs to the base {artifact.manifest.base_fingerprint}, but {base} is {found}"
            )
        staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            _write_weights(artifact, old, staging, _DTYPES[dtype], progress)
            for file in base.iterdir():
                if (
                    file.is_file()
                    and not file.name.startswith("model")
                    and file.suffix in (".json", ".jinja", ".txt", ".model")
                ):
                    shutil.copy(file, staging)
            staging.chmod(0o755)
            staging.rename(out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _write_weights(artifact: Artifact, old: Checkpoint, folder: Path, dtype: torch.dtype, progress: bool) -> None:
    """One file up to 2 GiB, else numbered shards with an index, so that one shard is in memory at a time."""
    import json

    shards: list[dict[str, torch.Tensor]] = [{}]
    size, total, weight_map = 0, 0, {}
    stored: list[list[str]] = []

    def flush() -> None:
        save_file(shards[0], folder / f"model-{len(stored) + 1:05d}.safetensors", metadata={"format": "pt"})
        stored.append(list(shards[0]))
        shards[0] = {}

    for name in tqdm(old.names, desc="decompressing", unit="tensor", disable=not progress):
        tensor = old.tensor(name)
        merged = _merged(artifact, name, old).to(dtype) if old.is_floating(name) else tensor
        if shards[0] and size + merged.nbytes > _SHARD_BYTES:
            flush()
            size = 0
        shards[0][name] = merged.contiguous()
        size += merged.nbytes
        total += merged.nbytes
    flush()
    if len(stored) == 1:
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
        return
    for i, names in enumerate(stored):
        file = f"model-{i + 1:05d}-of-{len(stored):05d}.safetensors"
        (folder / f"model-{i + 1:05d}.safetensors").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")


def _merged(artifact: Artifact, name: str, old: Checkpoint) -> torch.Tensor:
    """Base tensor plus its delta, fp32."""
    weight = old.floats(name).clone()
    parts = projection_parts(name, tuple(weight.shape), old.config)
    for part in parts:
        if part.name in artifact.records:
            part.view(weight).add_(delta_tensor(artifact, part.name))
    if parts:
        return weight
    if name not in artifact.records:
        raise ArtifactError(f"the delta has no record of {name}, which its base holds")
    record = artifact.records[name]
    if record.kind != "rows":
        return weight + delta_tensor(artifact, name)
    rows = torch.zeros(record.shape)
    rows[: weight.shape[0]] = weight
    return rows + delta_tensor(artifact, name)


def _floats(artifact: Artifact, key: str) -> torch.Tensor:
    array: Array = artifact.array(key)
    if artifact.slots[key].dtype == "BF16":
        return torch.from_numpy((array.astype(np.uint32) << 16).view(np.float32))
    return torch.from_numpy(array.astype(np.float32))
