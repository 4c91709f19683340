"""A delta file back to dense: the reference of what a delta means, and checkpoints for tools that know nothing of deltas."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from compressors import tokenizer
from compressors.artifact import Array, Artifact, Source
from compressors.errors import ArtifactError
from compressors.factors import read_factors
from compressors.fingerprint import INDEX, fingerprint
from compressors.layout import projection_parts
from compressors.tensors import Checkpoint, one_thread_per_operation
from compressors.verify import verify

_SHARD_BYTES = 2 << 30
_COPIED = (".json", ".jinja", ".txt", ".model")  # configuration and tokenizer
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def delta_tensor(artifact: Source, name: str) -> torch.Tensor:
    """The dense delta of one record, fp32, in the record's shape; "rows" gives added rows whole.

    A kind with factors: sum_k coef[k] * U[:, k] V[:, k]^T (factors.py).
    """
    record = artifact.records[name]
    if record.kind == "zero":
        return torch.zeros(record.shape)
    if record.kind == "raw":
        return _floats(artifact, f"{name}::delta").reshape(record.shape)
    if record.kind == "rows":
        dense = torch.zeros(record.shape)
        changed = _floats(artifact, f"{name}::row_delta")
        if f"{name}::row_scale" in artifact.slots:
            changed *= _floats(artifact, f"{name}::row_scale")[:, None]
        dense[torch.from_numpy(artifact.array(f"{name}::row_idx").astype(np.int64))] = changed
        return dense
    factors = read_factors(artifact, name)
    u, v = (torch.from_numpy(one.dense(rows)) for one, rows in zip((factors.u, factors.v), record.shape, strict=True))
    return (u * torch.from_numpy(factors.coef.copy())) @ v.T


def decompress(artifact_path: Path, base: Path, out: Path, dtype: str = "bf16", progress: bool = False) -> None:
    """Write base + delta as a Hugging Face folder `out`, which must not exist yet.

    `dtype`: fp32, bf16 or fp16. bf16 rounds the sum, which costs about 1 % of a typical delta; the gateway does not.
    The tokenizer's files are the base's, where the delta has none of its own. Raises BaseMismatchError, ArtifactError,
    CheckpointError, FileExistsError; `out` is whole or absent.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; name a new folder")
    with Checkpoint(base) as old:
        verify(artifact_path, fingerprint(base), {name: old.shape(name) for name in old.names}, base)
        with Artifact.open(artifact_path) as artifact, _staging(out) as staging:
            _write_weights(artifact, old, staging, dtype, progress)
            for file in base.iterdir():
                if file.is_file() and file.suffix in _COPIED and not file.name.startswith("model"):
                    shutil.copy(file, staging)
            _write_tokenizer(artifact, base, staging)
            _write_config(artifact, old, staging, dtype)


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block ends without an error."""
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_weights(artifact: Artifact, old: Checkpoint, folder: Path, dtype: str, progress: bool) -> None:
    """One file up to 2 GiB, else numbered shards with an index, so that one shard is in memory at a time."""
    shards = _shards(artifact, old, dtype)
    weight_map: dict[str, str] = {}
    total = 0
    bar = tqdm(desc="decompressing", total=sum(map(len, shards)), unit="tensor", disable=not progress)
    with bar, one_thread_per_operation():
        for i, names in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            tensors = {}
            for name in names:
                tensors[name] = merged_weight(artifact, name, old, dtype)
                total += tensors[name].nbytes
                bar.update()
            save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # save_file leaves it to its owner
            weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")


def _shards(artifact: Artifact, old: Checkpoint, dtype: str) -> list[list[str]]:
    """Names of the base's tensors in groups of up to 2 GiB."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in old.names:
        record = artifact.records.get(name)
        nbytes = math.prod(record.shape if record else old.shape(name)) * _DTYPES[dtype].itemsize
        if shards[-1] and size + nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def merged_weight(artifact: Artifact, name: str, old: Checkpoint, dtype: str = "fp32") -> torch.Tensor:
    """Base tensor plus its delta, in fp32, bf16 or fp16; tables of integers as they are."""
    if not old.is_floating(name):
        return old.tensor(name)
    weight = old.floats(name).clone()
    record = artifact.records.get(name)
    parts = projection_parts(name, tuple(weight.shape), old.config)
    if record is not None and record.tied_to is not None:
        return merged_weight(artifact, record.tied_to, old, dtype).clone()
    if record is not None and record.kind == "rows":
        grown = torch.zeros(record.shape)
        grown[: weight.shape[0]] = weight
        weight = grown
    if parts:
        for part in parts:
            if part.name not in artifact.records:
                raise ArtifactError(f"the delta has no record of {part.name}; was its base's config.json another one?")
            part.view(weight).add_(delta_tensor(artifact, part.name))
    elif record is not None:
        weight += delta_tensor(artifact, name)
    return weight.to(_DTYPES[dtype]).contiguous()


def _write_tokenizer(artifact: Artifact, base: Path, folder: Path) -> None:
    """The delta's own tokenizer and chat template, where it has them, in place of the base's."""
    told = artifact.manifest.tokenizer
    if told.files:
        for name in tokenizer.FILES:
            (folder / name).unlink(missing_ok=True)
        tokenizer.write(artifact, base, folder)
    elif told.chat_template is not None:
        (folder / tokenizer.TEMPLATE).write_text(told.chat_template, encoding="utf-8")


def _write_config(artifact: Artifact, old: Checkpoint, folder: Path, dtype: str) -> None:
    """The base's config.json with the fine-tune's vocabulary size and end tokens, and the dtype that was written."""
    config = {key: value for key, value in old.config.items() if key != "dtype"}
    config["torch_dtype"] = str(_DTYPES[dtype]).removeprefix("torch.")
    told = artifact.manifest.tokenizer
    changes = {"vocab_size": told.vocab_size, "eos_token_id": told.eos_token_id}
    config |= {key: value for key, value in changes.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _floats(artifact: Source, key: str) -> torch.Tensor:
    array: Array = artifact.array(key)
    if artifact.slots[key].dtype == "BF16":
        return torch.from_numpy((array.astype(np.uint32) << 16).view(np.float32))
    return torch.from_numpy(array.astype(np.float32))
