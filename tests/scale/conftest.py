"""Two gateways with real engines behind Ray Serve on this machine (`make test-ray`, in an environment of its own)."""

import os
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server.child import Child, ChildError, child_process, free_port
from tests.engine.conftest import tiny_base, tiny_deltas

__all__ = ["tiny_base", "tiny_deltas"]

START_S = 600  # Ray and two engines on a busy core
BASE = "tiny-llama"


@dataclass(frozen=True)
class Cluster:
    """`deltaworks ray` with two replicas; `replicas` are their own addresses."""

    child: Child
    replicas: tuple[str, str]

    @property
    def url(self) -> str:
        return self.child.url

    def admin(self, url: str | None = None) -> httpx.Client:
        return httpx.Client(base_url=url or self.url, headers=self.child.admin_headers, timeout=120)

    def processes(self) -> list[psutil.Process]:
        """All that the command has started."""
        return psutil.Process(self.child.process.pid).children(recursive=True)

    def process_of(self, replica: str) -> psutil.Process:
        """Who listens there, found among our own processes only."""
        port = int(replica.rpartition(":")[2])
        for process in self.processes():
            listening = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            if any(connection.laddr.port == port for connection in listening):
                return process
        raise AssertionError(f"nobody listens on {port}")

    def wait_replicas(self) -> None:
        for replica in self.replicas:
            until(lambda replica=replica: get(f"{replica}/health/ready") == 200, START_S)


def get(url: str) -> int:
    """Its status; 0 where nobody listens."""
    try:
        return httpx.get(url, timeout=30).status_code
    except httpx.TransportError:
        return 0


def until(condition: Any, timeout_s: float) -> float:
    """Seconds until it held."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, "it did not come to that in time"
        time.sleep(0.1)
    return time.monotonic() - started


@pytest.fixture(scope="session")
def cluster(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    port, own = free_port(), _two_free_ports()
    admin_key = secrets.token_urlsafe(16)
    settings = {
        "AUTH__ADMIN_KEYS": admin_key,
        "ENGINE__THREADS": "1",
        "ENGINE__MAX_NUM_SEQS": "8",
        "ENGINE__MAX_RESIDENT_DELTAS": "4",
        "ENGINE__DELTAS_PER_BATCH": "4",
    }
    environment = os.environ | {f"DELTAWORKS__{key}": value for key, value in settings.items()}
    arguments = ["--replicas", "2", "--port", str(port), "--replica-port", str(own), "--store", str(folder / "store")]
    engine = ["--dtype", "float32", "--max-model-len", "512", "--kv-cache-bytes", str(64 << 20)]
    command = [sys.executable, "-m", "server.cli", "ray", str(tiny_base), *arguments, *engine]
    headers = {"authorization": f"Bearer {admin_key}"}
    for last in (False, False, True):
        with child_process(command, environment | {"HF_HUB_OFFLINE": "1"}, folder / "ray.log") as process:
            child = Child(f"http://127.0.0.1:{port}", headers, process, folder / "ray.log")
            made = Cluster(child, (f"http://127.0.0.1:{own}", f"http://127.0.0.1:{own + 1}"))
            try:
                child.wait_ready(START_S)
            except ChildError as error:
                if last or "timed out during startup" not in str(error):
                    raise
                continue  # Ray gives itself half a minute to start, whatever else the machine does
            made.wait_replicas()
            yield made
            return


def _two_free_ports() -> int:
    """The first of two that follow each other."""
    while True:
        first = free_port()
        if get(f"http://127.0.0.1:{first + 1}/") == 0:
            return first
