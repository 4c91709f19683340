"""Children of commands: they end with whoever started them, however that ended."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARENT = """
import os, sys, tempfile, time
from pathlib import Path
from server.child import child_process, interruptible

with interruptible(), tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
    with child_process([sys.executable, "-c", sys.argv[2]], os.environ, Path(folder) / "log") as process:
        print(process.pid, flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_ends_with_its_parent(number: signal.Signals, tmp_path: Path) -> None:
    """SIGKILL leaves the temporary folder, and nothing that runs."""
    words = [sys.executable, "-c", PARENT, str(tmp_path), "import time; time.sleep(60)"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert _runs(child)
        parent.send_signal(number)
        _, said = parent.communicate(timeout=60)
    assert parent.returncode == (-number if number == signal.SIGKILL else -signal.SIGINT)
    assert ("KeyboardInterrupt" in said) == (number != signal.SIGKILL)
    deadline = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)
    assert bool(list(tmp_path.iterdir())) == (number == signal.SIGKILL)


def test_a_child_of_a_parent_that_is_gone_does_not_run(tmp_path: Path) -> None:
    """It ended before the child could ask to be told."""
    mark = tmp_path / "ran"
    launcher = [sys.executable, str(ROOT / "server" / "with_parent.py"), "1"]
    subprocess.run([*launcher, "/usr/bin/touch", str(mark)], check=True)
    assert not mark.exists()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
