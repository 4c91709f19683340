"""A gateway in a child process, with a store and an admin key of its own: what the demo and the benches talk to."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

_STOP_TIMEOUT_S = 60
_POLL_S = 0.5
_WITH_PARENT = Path(__file__).with_name("with_parent.py")


class ChildError(Exception):
    """The child ended, or was not ready in time; the message holds the end of its log."""


@dataclass(frozen=True)
class Child:
    """A running `deltaworks serve`, or another server that is compared with it."""

    url: str
    admin_headers: dict[str, str]
    process: subprocess.Popen[bytes]
    log: Path
    ready_path: str = "/health/ready"

    def wait_ready(self, timeout_s: float, waiting: Callable[[float], None] = lambda seconds: None) -> None:
        """Return when the model answers; `waiting` is told the seconds so far. Raises ChildError."""
        started = time.monotonic()
        while (seconds := time.monotonic() - started) < timeout_s:
            if self.process.poll() is not None:
                raise ChildError(f"the server ended with status {self.process.returncode}:\n{self._log_end()}")
            waiting(seconds)
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}{self.ready_path}").status_code == 200:
                    return
            time.sleep(_POLL_S)
        raise ChildError(f"the server was not ready after {timeout_s:.0f} s:\n{self._log_end()}")

    def _log_end(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-2000:]


@contextlib.contextmanager
def child_server(folder: Path, arguments: Sequence[str], port: int = 0) -> Iterator[Child]:
    """Start `deltaworks serve` with `arguments`, its store and log in `folder`; stop it at the end. Port 0: a free one."""
    port = port or free_port()
    admin_key = secrets.token_urlsafe(16)
    environment = dict(os.environ, DELTAWORKS__AUTH__ADMIN_KEYS=admin_key, HF_HUB_OFFLINE="1")
    command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port), "--store", str(folder / "store")]
    log = folder / "server.log"
    with child_process([*command, *arguments], environment, log) as process:
        yield Child(f"http://127.0.0.1:{port}", {"authorization": f"Bearer {admin_key}"}, process, log)


@contextlib.contextmanager
def child_process(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` in a session of its own; SIGTERM at the end, and SIGKILL to all of the session that is left.

    Where this process is killed and has no end to do it, the command gets its SIGTERM all the same.
    """
    words = with_parent(command)
    with log.open("wb") as output:
        process = subprocess.Popen(words, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def with_parent(command: Sequence[str]) -> list[str]:
    """The same command, with SIGTERM when the thread that starts it is gone. Its first word is a path."""
    return [sys.executable, "-I", "-S", str(_WITH_PARENT), str(os.getpid()), *command]


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM is a KeyboardInterrupt inside, as Ctrl-C is, so that children and temporary folders go. For the main thread."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def free_port() -> int:
    """Free at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
