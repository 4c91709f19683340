"""Compiles the kernel into a plain shared library: at install into the package, else once per machine into the cache folder.

Each instruction level is one more compilation of `level.cpp` with other flags; which one runs is decided at load.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-w")
AVX2 = ("-DDW_AVX2", "-mavx2", "-mfma", "-mpopcnt")
AVX512 = ("-DDW_AVX512", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mpopcnt")


class KernelUnavailableError(Exception):
    """The kernel could not be built or loaded; the message says why. The torch form serves in its place."""


def library_name() -> str:
    """Names everything that the library is made from, but for the compiler: any of them will do."""
    recipe = [file.read_bytes() for file in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")])]
    recipe += [repr((FLAGS, units())).encode(), sys.platform.encode()]
    return f"sparse_factors-{hashlib.sha256(b'|'.join(recipe)).hexdigest()[:16]}.so"


@functools.cache
def library() -> Path:
    """Path of the compiled kernel: the one that the install made, else one in the cache folder, compiled when it is not there.

    Raises KernelUnavailableError without a C++ compiler, or with the first lines of what the compiler said.
    """
    from compressors.base import cache_root  # not at install, when the package's requirements may be missing

    installed = FOLDER / library_name()
    if installed.is_file():
        return installed
    target = cache_root() / "kernels" / library_name()
    if not target.is_file():
        compile_to(target)
    return target


def units() -> dict[str, tuple[str, ...]]:
    """The compilations of the library: object name -> source and flags."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    common = ("-DDW_X86",) if x86 else ()
    plain = {
        "sparse_factors": ("sparse_factors.cpp", *common),
        "packing": ("packing.cpp",),
        "portable": ("level.cpp",),
    }
    return plain | ({"avx2": ("level.cpp", *AVX2), "avx512": ("level.cpp", *AVX512)} if x86 else {})


def compile_to(target: Path, compilations: Mapping[str, Sequence[str]] | None = None) -> None:
    """Compile (side by side) and link the library into the file `target`; by default the compilations of `units`.

    Raises KernelUnavailableError.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise KernelUnavailableError("no C++ compiler found (c++, g++ or clang++); install one, for example g++")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
        jobs, objects = [], []
        for name, (source, *flags) in (compilations or units()).items():
            objects.append(os.path.join(folder, f"{name}.o"))
            line = [compiler, *FLAGS, *flags, "-c", str(FOLDER / source), "-o", objects[-1]]
            jobs.append((source, subprocess.Popen(line, stderr=subprocess.PIPE, text=True)))
        said = [(source, job.communicate()[1], job.returncode) for source, job in jobs]
        for source, stderr, code in said:
            if code:
                raise KernelUnavailableError(f"{compiler} failed on {source}: {stderr[:500]}")
        staged = os.path.join(folder, target.name)
        link = [compiler, "-shared", "-o", staged, *objects]
        run = subprocess.run(link, capture_output=True, text=True, check=False)
        if run.returncode:
            raise KernelUnavailableError(f"{compiler} failed to link: {run.stderr[:500]}")
        os.replace(staged, target)


def main() -> int:
    """Build the kernel now rather than at the first start (`python -m compressors.kernels.build`)."""
    try:
        print(f"kernel: {library()}")
    except KernelUnavailableError as error:
        print(f"kernel not built, deltas will be served with torch CSR: {error}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
