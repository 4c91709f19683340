"""Prometheus' own checker, which `make promtool` puts into .venv/bin."""

import shutil
import sys
from pathlib import Path

from tests.lacking import lacking


def promtool() -> str:
    """Skips where there is none, but in CI, which installs it."""
    found = shutil.which("promtool") or shutil.which("promtool", path=Path(sys.executable).parent)
    return found or lacking("promtool: make promtool")
