"""Writes a delta file array by array, so that a large delta is never whole in memory; an interrupted write leaves nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from compressors.artifact import DTYPE_NAMES, MANIFEST_KEY, Array, Manifest, Ratios, encode_header


class ArtifactWriter:
    """Collects arrays in a temporary file beside `path`; `finish` puts the header before them and the file in its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._spool: IO[bytes] = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  # closed in __exit__
        self._header: dict[str, Any] = {}
        self._offset = 0

    def add(self, key: str, array: Array, bf16: bool = False) -> str:
        """Append an array (`bf16`: uint16 bit patterns of bf16 values); returns the sha256 of its bytes."""
        data = np.ascontiguousarray(array).tobytes()
        dtype = "BF16" if bf16 else DTYPE_NAMES[array.dtype]
        end = self._offset + len(data)
        self._header[key] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [self._offset, end]}
        self._spool.write(data)
        self._offset = end
        return hashlib.sha256(data).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays so far."""
        return self._offset

    def finish(self, manifest: Manifest, dense_bytes: int) -> Manifest:
        """Write the file and return its manifest, with the whole-file ratio filled in (`dense_bytes` / file size)."""
        for _ in range(4):  # the ratio's digits are part of the size that it is computed from
            size = 8 + len(self._encode(manifest)) + self._offset
            ratio = round(dense_bytes / size, 2)
            if manifest.ratios.whole_file == ratio:
                break
            ratios = Ratios(**(manifest.ratios.model_dump() | {"whole_file": ratio}))
            manifest = manifest.model_copy(update={"ratios": ratios})
        encoded = self._encode(manifest)
        descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(len(encoded).to_bytes(8, "little") + encoded)
                self._spool.seek(0)
                shutil.copyfileobj(self._spool, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return manifest

    def _encode(self, manifest: Manifest) -> bytes:
        return encode_header(
            {"__metadata__": {MANIFEST_KEY: manifest.model_dump_json(), "format": "pt"}, **self._header}
        )

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spool.close()
