"""Write gpu.txt: the exact versions of everything that the extras gpu, s3 and otel need on Linux x86-64, with hashes.

    .venv/bin/python deploy/lock/resolve_gpu.py > deploy/lock/gpu.txt     # needs uv, PyPI, and no GPU

uv resolves from metadata alone. Versions are those of cpu.txt, which the tests run with, wherever vLLM's CUDA build allows
them. Of a package's files only those that the platform takes are listed.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).parents[2]
EXTRAS = ("gpu", "s3", "otel")
PYTHON = (3, 11)
GLIBC = 36  # of Debian 12
SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"
LEFT_OUT = (
    "llm",
    "llama-cpp-python",
)  # around the default base; we read its GGUF only, and the second compiles for minutes
BUILD = ("setuptools", "wheel")  # `pip install --no-build-isolation .` needs them


def platform_tags() -> set[Tag]:
    names = [f"manylinux_2_{minor}" for minor in range(GLIBC, 4, -1)]
    platforms = [f"{name}_x86_64" for name in (*names, "manylinux2014", "manylinux2010", "manylinux1", "linux")]
    return {*cpython_tags(PYTHON, platforms=platforms), *compatible_tags(PYTHON, "cp311", platforms)}


def resolved() -> list[Requirement]:
    version = ".".join(map(str, PYTHON))
    with tempfile.TemporaryDirectory() as folder:
        build, without, lock = (Path(folder) / name for name in ("build.in", "without.txt", "gpu.txt"))
        build.write_text("\n".join(BUILD))
        without.write_text("\n".join(f"{name}; sys_platform == 'none'" for name in LEFT_OUT))
        shutil.copy(
            ROOT / "deploy/lock/cpu.txt", lock
        )  # uv keeps the versions of the file that it writes, where it may
        command = ["uv", "pip", "compile", "pyproject.toml", str(build), "--overrides", str(without)]
        command += ["--output-file", str(lock)]
        command += [argument for extra in EXTRAS for argument in ("--extra", extra)]
        command += ["--python-version", version, "--python-platform", f"x86_64-manylinux_2_{GLIBC}"]
        command += ["--default-index", "https://pypi.org/simple", "--no-annotate", "--no-header", "--quiet"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return [Requirement(line) for line in lock.read_text().splitlines() if line.strip()]


def pinned(requirement: Requirement, tags: set[Tag]) -> str:
    """The requirement with the hashes of its wheels for the platform, or of its source where it has none."""
    [version] = [specifier.version for specifier in requirement.specifier]
    url = f"https://pypi.org/simple/{canonicalize_name(requirement.name)}/"
    with urlopen(Request(url, headers={"Accept": SIMPLE_JSON}), timeout=60) as answer:
        digests = {one["filename"]: one["hashes"]["sha256"] for one in json.load(answer)["files"]}
    chosen = [digest for name, digest in digests.items() if _wheel_fits(name, version, tags)]
    chosen = chosen or [digest for name, digest in digests.items() if _is_source(name, version)]
    if not chosen:
        raise SystemExit(f"{requirement} has no file for the platform")
    hashes = (f"    --hash=sha256:{digest}" for digest in sorted(chosen))
    return " \\\n".join([f"{requirement.name}=={version}", *hashes])


def _wheel_fits(filename: str, version: str, tags: set[Tag]) -> bool:
    try:
        _, of, _, own = parse_wheel_filename(filename)
    except InvalidWheelFilename:
        return False
    return of == Version(version) and bool(own & tags)


def _is_source(filename: str, version: str) -> bool:
    try:
        return parse_sdist_filename(filename)[1] == Version(version)
    except (InvalidSdistFilename, InvalidVersion):
        return False


def main() -> None:
    tags = platform_tags()
    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(lambda requirement: pinned(requirement, tags), resolved()))
    print("# Made by deploy/lock/resolve_gpu.py; install with --no-deps --require-hashes.")
    sys.stdout.write("\n".join(entries) + "\n")


if __name__ == "__main__":
    main()
