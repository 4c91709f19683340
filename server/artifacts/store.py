"""Bytes by digest, names by file: git's model on one folder.

    objects/<sha256>          immutable artifacts
    refs/<kind>/<name>.json   what a name points to
    incoming/                 uploads under way; emptied at start
    lock                      held by the one server that uses the folder

Everything visible is complete: a file is written beside its place, synced, renamed, and the folder synced.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fsspec.implementations.local import LocalFileSystem

from server.core import GatewayError

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class StoreError(Exception):
    """The store cannot be used at all; ends the start of the server."""


class StoreLockedError(StoreError):
    """Another server uses the folder."""


class InsufficientStorage(GatewayError):
    """No space left in the store."""


class BodyTooLarge(GatewayError):
    """More bytes than the limit allows."""


class Incoming:
    """A temporary file of the store that is hashed while it is written."""

    def __init__(self, path: Path, file: IO[bytes], max_bytes: int) -> None:
        self.path = path
        self.nbytes = 0
        self._file = file
        self._hash = hashlib.sha256()
        self._max_bytes = max_bytes

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """Blocking. Raises BodyTooLarge, InsufficientStorage."""
        self.nbytes += len(data)
        if self.nbytes > self._max_bytes:
            raise BodyTooLarge(f"the file is larger than the limit of {self._max_bytes} bytes")
        self._hash.update(data)
        with no_space_named():
            self._file.write(data)

    def sync(self) -> None:
        """Blocking. Everything written so far is on the disk after this."""
        with no_space_named():
            self._file.flush()
            os.fsync(self._file.fileno())


class Store:
    """A local folder, read through fsspec; `open()` takes the lock and clears what an earlier crash left.

    `nbytes`: what its objects take, at most `max_bytes` where that is given.
    """

    def __init__(self, root: Path, max_bytes: int | None = None) -> None:
        self.root = root.expanduser().absolute()
        self.nbytes = 0
        self._max_bytes = max_bytes
        self._files = LocalFileSystem()
        self._lock: IO[str] | None = None

    def open(self) -> None:
        """Raises StoreError, StoreLockedError."""
        try:
            for folder in ("objects", "refs", "incoming"):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            self._lock = (self.root / "lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise StoreError(f"cannot use the store {self.root}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self.close()
            raise StoreLockedError(
                f"the store {self.root} is in use by another server (process {holder}); "
                "stop it, or give this server its own store with --store"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        for leftover in (self.root / "incoming").iterdir():
            leftover.unlink()
        self.nbytes = sum(self.object_path(digest).stat().st_size for digest in self.objects())

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @contextlib.contextmanager
    def incoming(self, max_bytes: int) -> Iterator[Incoming]:
        """A temporary file that is gone when the block ends, unless it was published."""
        with no_space_named():
            handle, name = tempfile.mkstemp(dir=self.root / "incoming")
        path = Path(name)
        try:
            with os.fdopen(handle, "wb", buffering=0) as file:
                yield Incoming(path, file, max_bytes)
        finally:
            path.unlink(missing_ok=True)

    def publish(self, incoming: Incoming) -> None:
        """Make the bytes visible under their digest. Blocking. Raises InsufficientStorage."""
        if self._max_bytes is not None and self.nbytes + incoming.nbytes > self._max_bytes:
            raise InsufficientStorage(
                f"the store holds {self.nbytes} bytes and the file has {incoming.nbytes}; store.max_bytes is {self._max_bytes}"
            )
        incoming.sync()
        with no_space_named():
            incoming.path.replace(self.object_path(incoming.digest))
            self.nbytes += incoming.nbytes
            _sync_folder(self.root / "objects")

    def object_path(self, digest: str) -> Path:
        return self.root / "objects" / digest

    def has_object(self, digest: str) -> bool:
        return bool(self._files.isfile(str(self.object_path(digest))))

    def delete_object(self, digest: str) -> None:
        path = self.object_path(digest)
        with contextlib.suppress(FileNotFoundError):
            nbytes = path.stat().st_size
            self._files.rm_file(str(path))
            self.nbytes -= nbytes

    def objects(self) -> list[str]:
        names = [Path(path).name for path in self._files.ls(str(self.root / "objects"), detail=False)]
        return sorted(name for name in names if _DIGEST.fullmatch(name))

    def kinds(self) -> set[str]:
        """The kinds that have a folder of refs, and at least one name in it."""
        return {path.parent.name for path in (self.root / "refs").glob("*/*.json")}

    def refs(self, kind: str) -> dict[str, bytes]:
        """name -> content of every ref of a kind."""
        folder = self.root / "refs" / kind
        folder.mkdir(exist_ok=True)
        paths = [Path(path) for path in self._files.ls(str(folder), detail=False)]
        for leftover in (path for path in paths if path.suffix == ".tmp"):
            leftover.unlink()
        return {path.stem: self._files.cat_file(str(path)) for path in sorted(paths) if path.suffix == ".json"}

    def write_ref(self, kind: str, name: str, content: bytes) -> None:
        """Replace a ref in one step; visible now, durable after `sync_refs`. Blocking. Raises InsufficientStorage."""
        target = self.root / "refs" / kind / f"{name}.json"
        temporary = target.with_suffix(".tmp")
        try:
            with no_space_named(), temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def delete_ref(self, kind: str, name: str) -> None:
        (self.root / "refs" / kind / f"{name}.json").unlink(missing_ok=True)

    def sync_refs(self, kind: str) -> None:
        with no_space_named():
            _sync_folder(self.root / "refs" / kind)


@contextlib.contextmanager
def no_space_named() -> Iterator[None]:
    """Turn the operating system's no-space errors into InsufficientStorage."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise InsufficientStorage("no space left in the artifact store") from error
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
