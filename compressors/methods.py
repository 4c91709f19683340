"""Every compression method, as a literal list. A method takes (base, fine_tune, out, config, name, progress)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compressors.artifact import Manifest
from compressors.compress import compress
from compressors.impart import ImPartConfig

METHODS: dict[str, Callable[[Path, Path, Path, ImPartConfig, str | None, bool], Manifest]] = {
    "impart": compress,
}
