"""Where Triton is for the tests: installed, or in a folder of its own, because vLLM for CPUs should not find it."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.lacking import lacking

FOLDER = Path(sys.prefix) / "triton"  # `make test` puts it there


def triton_environment(interpret: bool) -> dict[str, str]:
    """The environment of a child process that can import Triton. Skips where it is not on this machine, but in CI."""
    path = [os.environ.get("PYTHONPATH", "")]
    if find_spec("triton") is None:
        if not FOLDER.is_dir():
            lacking("Triton: make test fetches it")
        path.append(str(FOLDER))
    changed = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "TRITON_INTERPRET": str(int(interpret))}
    return {**os.environ, **changed}
