"""What `deltaworks ray` refuses before it starts anything."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--replicas", "0"], "--replicas: Input should be greater than or equal to 1"),
        (["--admin-port", "8001"], "setting 'server.admin_port': Ray Serve has one port"),
        (["--port", "TAKEN"], "is in use; choose another with --port"),
    ],
)
def test_a_wrong_start_is_one_line(tiny_base: Path, flags: list[str], said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        given = [flag.replace("TAKEN", port) for flag in flags]
        command = [sys.executable, "-m", "server.cli", "ray", str(tiny_base), *given]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line
