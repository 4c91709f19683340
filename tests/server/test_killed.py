"""R12: a server that is killed at any line of a publish, a move or a deletion leaves a store that is whole.

A zygote imports everything once and forks a server for each line; the child kills itself (SIGKILL) just before it runs that line of
the store's code, for every line that the operation runs. After each, a new server starts on what was left.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.store_operations import AFTER

ZYGOTE = r'''
import asyncio, json, os, shutil, signal, sys, threading
from pathlib import Path

from server.artifacts.store import Store
from tests.server import store_operations
from tests.server.store_operations import NEW, OPERATIONS

FILES = tuple(f"server/artifacts/{name}.py" for name in ("store", "folder", "shelf", "names"))


def start(root):
    store = Store(root)
    return store, store_operations.start(store)


def kill_before(line):
    """Counts the lines of the store's code as they run for the first time, in all threads."""
    seen = set()

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.endswith(FILES):
            return None
        here = frame.f_code.co_filename, frame.f_lineno
        if event == "line" and here not in seen:
            if len(seen) == line:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.add(here)
        return trace

    threading.settrace(trace)
    sys.settrace(trace)


def run(operation, root, line, acknowledged):
    store, registry = start(root)
    kill_before(line)
    asyncio.run(OPERATIONS[operation](store, registry, NEW))
    sys.settrace(None)
    os.write(acknowledged, b"!")


def state(root):
    """What a server finds that starts now; no file is there but what that needs."""
    found = store_operations.state(*start(root))
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    expected = ["lock"]
    if found:
        expected += ["refs/delta/red.json", *(f"objects/{digest}" for digest in found[1])]
    assert files == sorted(expected), files
    return found


def main(operation, folder):
    before = Path(folder, "before")
    asyncio.run(store_operations.before(operation, *start(before)))
    was, line, seen = state(before), 0, []
    while True:
        root = Path(folder, str(line))
        shutil.copytree(before, root)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            run(operation, root, line, writer)
            os._exit(0)
        os.close(writer)
        acknowledged = os.read(reader, 1) == b"!"
        os.close(reader)
        _, status = os.waitpid(child, 0)
        seen.append((acknowledged, state(root)))
        shutil.rmtree(root)
        if not os.WIFSIGNALED(status):
            assert status == 0
            break
        line += 1
    print(json.dumps({"was": was, "seen": seen}))


main(*sys.argv[1:])
'''


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["publish", "move", "delete"])
def test_r12_killed_at_any_step(operation: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ZYGOTE, operation, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    after = AFTER[operation]
    assert len(told["seen"]) > 40
    for acknowledged, state in told["seen"]:
        assert state in ([after] if acknowledged else [told["was"], after])
    states = [state for _, state in told["seen"]]
    assert states[0] == told["was"]
    assert told["seen"][-1] == [True, after]
    assert [state == after for state in states] == sorted(state == after for state in states)  # it happens in one step
