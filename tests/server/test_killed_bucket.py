"""R12 on a bucket: a server that is killed at any step of a publish, a move or a deletion leaves a store that is whole.

A zygote imports everything once and forks a server for each step. The object store kills that server (SIGKILL) when it has done
a request and before it answers: the operation's first, then every one that changes something, for the others leave what they found.
After each, a new server starts on what was left.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.artifacts import bucket
from server.artifacts.bucket import Bucket
from server.artifacts.store import Store
from tests.server import store_operations
from tests.server.s3_server import BUCKET, S3Server, running_s3
from tests.server.store_operations import AFTER

ZYGOTE = r"""
import asyncio, os, sys
from pathlib import Path

from server.artifacts import bucket
from server.artifacts.store import Store
from tests.server.store_operations import NEW, OPERATIONS, start

cache, url = sys.argv[1:]
while asked := sys.stdin.readline().split():
    operation, place = asked
    child = os.fork()
    if not child:
        store = Store(bucket.Bucket(place, Path(cache), url))
        registry = start(store)
        if operation == "delete":
            bucket.UPLOAD_S = -1.0  # no upload is under way: objects go with their last name
        print(os.getpid(), flush=True)
        os.read(0, 1)
        asyncio.run(OPERATIONS[operation](store, registry, NEW))
        print("done", flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0 or os.WIFSIGNALED(status), status
    print("over", flush=True)
"""


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def zygote(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", ZYGOTE, str(tmp_path_factory.mktemp("theirs")), s3.url]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, cwd=root
    ) as zygote:
        yield zygote
        assert zygote.stdin is not None
        zygote.stdin.close()
        assert zygote.wait(10) == 0


class Killer:
    """Kills the armed process when the store has done its first request, or the `change`-th that changes something."""

    def __init__(self, s3: S3Server) -> None:
        self._pid: int | None = None
        self._left = 0
        s3.after = self._after

    def arm(self, pid: int, change: int) -> None:
        self._pid, self._left = pid, change

    def disarm(self) -> None:
        self._pid = None

    def _after(self, environ: dict[str, Any], answer: Any) -> None:
        if self._pid is None:
            return
        first = self._left == 0
        self._left -= environ["REQUEST_METHOD"] not in ("GET", "HEAD")
        if first or self._left == 0:
            os.kill(self._pid, signal.SIGKILL)
            self.disarm()


def found(place: str, cache: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> list[object] | None:
    """What a server finds that starts when no upload can be under way any more; what has no name is gone then."""
    with monkeypatch.context() as patch:
        patch.setattr(bucket, "UPLOAD_S", -1.0)
        store = Store(Bucket(place, cache, url))
        state = store_operations.state(store, store_operations.start(store))
        assert store.objects() == (sorted(state[1]) if state else [])
        store.close()
    return state


def copy(client: Any, old: str, new: str) -> None:
    for key in [one["Key"] for one in client.list_objects_v2(Bucket=BUCKET, Prefix=f"{old}/")["Contents"]]:
        source = {"Bucket": BUCKET, "Key": key}
        client.copy_object(Bucket=BUCKET, Key=key.replace(old, new, 1), CopySource=source)


def run(zygote: subprocess.Popen[str], killer: Killer, operation: str, place: str, change: int) -> bool:
    """Whether the operation was done before its server was killed."""
    assert zygote.stdin is not None
    assert zygote.stdout is not None
    zygote.stdin.write(f"{operation} {place}\n")
    killer.arm(int(zygote.stdout.readline()), change)
    zygote.stdin.write("\n")
    told = [zygote.stdout.readline().strip()]
    while told[-1] != "over":
        told.append(zygote.stdout.readline().strip())
    killer.disarm()
    return told[0] == "done"


@pytest.mark.slow
@pytest.mark.parametrize(("operation", "changes"), [("publish", 2), ("move", 1), ("delete", 3)])
def test_r12_on_a_bucket_killed_at_any_change(
    operation: str,
    changes: int,
    s3: S3Server,
    zygote: subprocess.Popen[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, cache, after = f"s3://{BUCKET}/{operation}", tmp_path / "mine", AFTER[operation]
    store = Store(Bucket(place, cache, s3.url))
    registry = store_operations.start(store)
    asyncio.run(store_operations.before(operation, store, registry))
    was = store_operations.state(store, registry)
    store.close()
    client, killer, seen, done = s3.client(), Killer(s3), [], False
    while not done:
        step = len(seen)
        copy(client, operation, f"{operation}-{step}")
        done = run(zygote, killer, operation, f"{place}-{step}", step)
        seen.append(found(f"{place}-{step}", cache, s3.url, monkeypatch))
    assert len(seen) == 1 + changes + 1
    assert (seen[0], seen[-1]) == (was, after)
    assert all(state in (was, after) for state in seen)
    assert [state == after for state in seen] == sorted(state == after for state in seen)  # it happens in one step
