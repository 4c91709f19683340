"""Streaming access to checkpoint folders: a tensor is read when it is asked for, and only what is in hand is in memory.

Files are read, not mapped: pages of a mapped checkpoint stay with the process as long as nobody else wants the memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from compressors.errors import CheckpointError
from compressors.fingerprint import StoredTensor, stored_tensors
from compressors.layout import Part

_FLOATING = ("F64", "F32", "F16", "BF16")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


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


@dataclass(frozen=True)
class Table:
    """A tensor by blocks of rows: `table[start:stop]`, read when it is asked for."""

    shape: tuple[int, ...]
    block: Callable[[int, int], torch.Tensor]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        return self.block(start, max(start, stop))


class Checkpoint:
    """A Hugging Face model folder with safetensors weights, open for reading. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError when the folder is no readable checkpoint."""
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = stored_tensors(folder)
        self.config = self._json("config.json")
        self._open: dict[Path, int] = {}

    @property
    def names(self) -> list[str]:
        return sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name).shape

    def is_floating(self, name: str) -> bool:
        return self._stored(name).dtype in _FLOATING

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored, in memory of its own. Raises CheckpointError when it is missing or cannot be read."""
        stored = self._stored(name)
        return self._loaded(name, stored, stored.shape, stored.start, stored.end)

    def floats(self, name: str) -> torch.Tensor:
        """The tensor in fp32. Raises CheckpointError when a value is not finite or not a float."""
        return self.finite(name).float()

    def finite(self, name: str, part: Part | None = None) -> torch.Tensor:
        """The tensor as stored, or one part of it. Raises CheckpointError when a value is not finite or not a float."""
        self._floating(name)
        values = self.tensor(name) if part is None else part.view(self.tensor(name))
        return self._checked(name, values)

    def table(self, name: str) -> Table:
        """The rows of a tensor, each block as `finite` gives it. Raises CheckpointError when it is not of floats."""
        stored = self._floating(name)
        width = (stored.end - stored.start) // max(1, stored.shape[0])

        def block(start: int, stop: int) -> torch.Tensor:
            shape = (stop - start, *stored.shape[1:])
            values = self._loaded(name, stored, shape, stored.start + start * width, stored.start + stop * width)
            return self._checked(name, values)

        return Table(stored.shape, block)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _read(self, file: Path, place: int, values: torch.Tensor) -> None:
        """Fill `values` u8 from a place of a file on. Any thread may call it."""
        if file not in self._open:
            opened = os.open(file, os.O_RDONLY)
            if self._open.setdefault(file, opened) != opened:  # another thread was first
                os.close(opened)
        left = values.numpy().data
        while len(left):
            count = os.preadv(self._open[file], [left], place)
            if not count:
                raise OSError("the file ends before it")
            left, place = left[count:], place + count

    def _loaded(self, name: str, stored: StoredTensor, shape: tuple[int, ...], start: int, end: int) -> torch.Tensor:
        """Bytes [start, end) of a tensor's file as its dtype."""
        if stored.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.folder.name}: {name} has dtype {stored.dtype}, known are {', '.join(_DTYPES)}"
            )
        values = torch.empty(end - start, dtype=torch.uint8)
        try:
            self._read(stored.file, start, values)
            return values.view(_DTYPES[stored.dtype]).view(shape)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.folder.name}: {name} cannot be read: {error}") from error

    def _checked(self, name: str, values: torch.Tensor) -> torch.Tensor:
        if values.numel() and not all(map(torch.isfinite, torch.aminmax(values))):
            raise CheckpointError(f"{self.folder.name}: {name} holds NaN or infinite values; the checkpoint is broken")
        return values

    def _floating(self, name: str) -> StoredTensor:
        stored = self._stored(name)
        if stored.dtype not in _FLOATING:
            raise CheckpointError(f"{self.folder.name}: {name} has dtype {stored.dtype}, not a float dtype")
        return stored

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
