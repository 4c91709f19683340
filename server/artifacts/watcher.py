"""A folder whose deltas are published as they appear in it: for controllers that place files and call nobody."""

import asyncio
import contextlib
import logging
import os
from pathlib import Path

from compressors.errors import DeltaError
from server.artifacts.adapters import AdapterFolder
from server.artifacts.lifecycle import DeltaLifecycle
from server.background import Background
from server.core import GatewayError

log = logging.getLogger("deltaworks.watcher")

Sign = tuple[tuple[int, int, int], ...]  # (inode, size, mtime) of every file of an adapter


class Watcher(Background):
    """Publishes NAME.safetensors and PEFT folders NAME, and again when they change. What leaves the folder stays published.

    An adapter is read when it has looked the same twice: it may still be on its way.
    """

    what = "watching the folder of deltas"

    def __init__(self, folder: AdapterFolder, deltas: DeltaLifecycle, interval_s: float, max_bytes: int) -> None:
        self._folder = folder
        self._deltas = deltas
        self._interval_s = interval_s
        self._max_bytes = max_bytes
        self._seen: dict[str, Sign] = {}
        self._done: dict[str, Sign] = {}

    async def run(self) -> None:
        while True:
            for path, sign in (await asyncio.to_thread(_look, self._folder.root)).items():
                if self._seen.get(path) == sign != self._done.get(path):
                    self._done[path] = sign  # one that is refused is refused once
                    await self._publish(path)
                self._seen[path] = sign
            await asyncio.sleep(self._interval_s)

    async def _publish(self, path: str) -> None:
        name = path.removesuffix(".safetensors")
        try:
            self._deltas.check_name(name)
            with self._deltas.incoming(self._max_bytes) as incoming:
                await asyncio.to_thread(self._folder.read, path, incoming)
                await self._folder.publish(name, incoming, replace=True, expected_generation=None)
        except (GatewayError, DeltaError, OSError) as error:
            log.warning("%r in the watched folder is not served: %s", path, error)


def _look(root: Path) -> dict[str, Sign]:
    """Blocking."""
    found: dict[str, Sign] = {}
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # gone again
                if entry.is_dir():
                    files = sorted(Path(entry.path).iterdir())
                elif entry.name.endswith(".safetensors"):
                    files = [Path(entry.path)]
                else:
                    continue
                stats = [file.stat() for file in files]
                found[entry.name] = tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)
    return found
