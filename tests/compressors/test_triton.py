"""The GPU kernels in child processes that find Triton: run by its interpreter, and compiled for GPUs that need not be here."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.compressors.triton_folder import triton_environment

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["triton_interpreted.py", "triton_compiled.py"])
def test_the_gpu_kernels(script: str, tmp_path: Path):
    environment = triton_environment(interpret=script == "triton_interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/compressors/{script}"]
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
