"""What a base model *is*: a digest over its tensors, so that a delta is never applied to other weights under a familiar name.

Reads safetensors headers itself: no torch, one pass over the bytes, remembered per file until the file changes.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressors.base import cache_root
from compressors.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of a checkpoint lies. `dtype` as safetensors spells it; bytes [start, end) of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: `model.safetensors`, or those that its index names.

    Raises CheckpointError when there are none, or an index names one that is missing.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a valid index of shards") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks the shard {missing[0]} that its index names; download it again")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if not single.is_file():
        raise CheckpointError(f"{folder} has neither model.safetensors nor {INDEX}; pickle checkpoints are not read")
    return [single]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder by name. Raises CheckpointError."""
    return {name: tensor for file in checkpoint_files(folder) for name, tensor in _tensors_of(file)}


def fingerprint(folder: Path, cache: bool = True) -> str:
    """`sha256:<hex>` over the sorted (name, dtype, shape, sha256 of the bytes) of all tensors. Raises CheckpointError."""
    lines: list[str] = []
    for file in checkpoint_files(folder):
        lines += _file_lines(file, cache)
    return "sha256:" + hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _file_lines(file: Path, cache: bool) -> list[str]:
    """One line per tensor of a file; remembered under its path, size and time of change."""
    status = file.stat()
    identity = f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    remembered = cache_root() / "fingerprints" / f"{hashlib.sha256(identity.encode()).hexdigest()}.txt"
    if cache and remembered.is_file():
        return remembered.read_text(encoding="utf-8").splitlines()
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        lines = [
            f"{name} {tensor.dtype} {list(tensor.shape)} {hashlib.sha256(memoryview(data)[tensor.start : tensor.end]).hexdigest()}"
            for name, tensor in _tensors_of(file)
        ]
    if cache:
        with suppress(OSError):  # a read-only or full cache folder costs time, not the answer
            remembered.parent.mkdir(parents=True, exist_ok=True)
            staging = remembered.with_suffix(f".{os.getpid()}.tmp")
            staging.write_text("\n".join(lines), encoding="utf-8")
            staging.replace(remembered)
    return lines


def _tensors_of(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size - 8:
                raise CheckpointError(f"{file} is truncated, or is not a safetensors file")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if 8 + length + end > file.stat().st_size:
                raise CheckpointError(f"{file} is truncated: tensor {name} lies beyond its end")
            yield name, StoredTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + start, 8 + length + end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} has a damaged header: {error}") from error
