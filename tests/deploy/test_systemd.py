"""The systemd unit: hardened, and in line with the command and its settings."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from server.cli import main
from server.config import Settings

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "deltaworks.service"


def directives() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if line and line[0] not in "#[":
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


def test_s10_unit_is_nobody_with_nothing() -> None:
    found = {key: values[-1] for key, values in directives().items()}
    assert found["DynamicUser"] == found["NoNewPrivileges"] == found["RestrictSUIDSGID"] == "yes"
    assert found["CapabilityBoundingSet"] == found["AmbientCapabilities"] == ""
    assert found["ProtectSystem"] == "strict"
    assert found["SystemCallFilter"] == "@system-service"
    assert found["UMask"] == "0077"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit_and_finds_little_exposed(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text()))
    run = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", unit]
    run = subprocess.run(command, capture_output=True, text=True)  # the threshold is in tenths: 2.0 of 10
    assert run.returncode == 0, run.stdout[-2000:]


def test_command_is_understood_and_has_the_time_to_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = directives()
    [command] = found["ExecStart"]
    (tmp_path / "gateway.toml").touch()
    program, *arguments = command.replace("/etc/deltaworks", str(tmp_path)).split()
    assert program == "/opt/deltaworks/.venv/bin/deltaworks"
    assert main([*arguments, "--print-config"]) == 0
    assert "[server]" in capsys.readouterr().out
    assert "DELTAWORKS__AUTH__ADMIN_KEY_FILE=%d/admin-keys" in found["Environment"]
    assert found["LoadCredential"] == ["admin-keys:/etc/deltaworks/admin-keys"]
    assert int(found["TimeoutStopSec"][0]) >= Settings().server.shutdown_timeout_s + 20  # the engine's own time
    assert found["KillMode"] == ["mixed"]
