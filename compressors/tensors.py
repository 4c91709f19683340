"""Streaming access to checkpoint folders: tensors are mapped, and only the one in hand is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open

from compressors.errors import CheckpointError
from compressors.fingerprint import StoredTensor, stored_tensors
from compressors.layout import Part

_FLOATING = ("F64", "F32", "F16", "BF16")


@contextmanager
def one_thread_per_operation() -> Iterator[int]:
    """Keep torch's operations to one thread each; yields how many threads it had, to be given to whole tensors instead.

    The result of an operation can depend on its number of threads, and small operations lose more than they gain.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


class Checkpoint:
    """A Hugging Face model folder with safetensors weights, open for reading. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError when the folder is no readable checkpoint."""
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = stored_tensors(folder)
        self.config = self._json("config.json")
        self._open: dict[Path, Any] = {}

    @property
    def names(self) -> list[str]:
        return sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name).shape

    def is_floating(self, name: str) -> bool:
        return self._stored(name).dtype in _FLOATING

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored. Raises CheckpointError when it is missing."""
        file = self._stored(name).file
        if file not in self._open:
            self._open[file] = safe_open(file, "pt")
        tensor: torch.Tensor = self._open[file].get_tensor(name)
        return tensor

    def floats(self, name: str) -> torch.Tensor:
        """The tensor in fp32. Raises CheckpointError when a value is not finite or not a float."""
        return self.finite(name).float()

    def finite(self, name: str, part: Part | None = None) -> torch.Tensor:
        """The tensor as stored, or one part of it. Raises CheckpointError when a value is not finite or not a float."""
        if not self.is_floating(name):
            raise CheckpointError(f"{self.folder.name}: {name} has dtype {self._stored(name).dtype}, not a float dtype")
        values = self.tensor(name) if part is None else part.view(self.tensor(name))
        if not torch.isfinite(values).all():
            raise CheckpointError(f"{self.folder.name}: {name} holds NaN or infinite values; the checkpoint is broken")
        return values

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()

    def _stored(self, name: str) -> StoredTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder.name} has no tensor {name}") from None

    def _json(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        if not file.is_file():
            return {}
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{file} is not JSON: {error}") from error
        return value if isinstance(value, dict) else {}
