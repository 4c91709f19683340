"""Prometheus' own checker, which `make promtool` puts into .venv/bin."""

import os
import shutil
import sys
from pathlib import Path

import pytest


def promtool() -> str:
    """Skips where there is none, but in CI, which installs it."""
    found = shutil.which("promtool") or shutil.which("promtool", path=Path(sys.executable).parent)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("CI has no promtool: make promtool")
        pytest.skip("no promtool: make promtool")
    return found
