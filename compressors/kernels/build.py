"""Compiles the kernel once per machine into a plain shared library in the cache folder."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from compressors.base import cache_root

SOURCE = Path(__file__).with_name("sparse_factors.cpp")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp")


class KernelUnavailableError(Exception):
    """The kernel could not be built or loaded; the message says why. The torch form serves in its place."""


@functools.cache
def library() -> Path:
    """Path of the compiled kernel, compiling it when this source was not compiled here before.

    Raises KernelUnavailableError without a C++ compiler, or with the first lines of what the compiler said.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise KernelUnavailableError("no C++ compiler found (c++, g++ or clang++); install one, for example g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    recipe = "\0".join([SOURCE.read_text(encoding="utf-8"), *FLAGS, version, os.uname().machine])
    target = cache_root() / "kernels" / f"sparse_factors-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.so"
    if not target.is_file():
        _compile(compiler, target)
    return target


def _compile(compiler: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(descriptor)
    staging = Path(name)
    try:
        run = subprocess.run(
            [compiler, *FLAGS, "-o", str(staging), str(SOURCE)], capture_output=True, text=True, check=False
        )
        if run.returncode != 0:
            raise KernelUnavailableError(f"{compiler} failed on {SOURCE.name}: {run.stderr[:500]}")
        staging.rename(target)
    finally:
        staging.unlink(missing_ok=True)


def main() -> int:
    """Build the kernel now rather than at the first start (`python -m compressors.kernels.build`)."""
    try:
        print(f"kernel: {library()}")
    except KernelUnavailableError as error:
        print(f"kernel not built, deltas will be served with torch CSR: {error}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
