"""Where Triton is for the tests: installed, or in a folder of its own, because vLLM for CPUs should not find it."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(sys.prefix) / "triton"  # `make test` puts it there


def triton_environment(interpret: bool) -> dict[str, str] | None:
    """The environment of a child process that can import Triton; None where it is not on this machine."""
    path = [os.environ.get("PYTHONPATH", "")]
    if find_spec("triton") is None:
        if not FOLDER.is_dir():
            return None
        path.append(str(FOLDER))
    changed = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "TRITON_INTERPRET": str(int(interpret))}
    return {**os.environ, **changed}
