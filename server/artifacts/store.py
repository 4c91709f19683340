"""Bytes by digest, names by file: git's model on a local folder or a bucket that servers share.

    objects/<sha256>          immutable artifacts
    refs/<kind>/<name>.json   what a name points to
    incoming/                 uploads under way, always in a local folder; what an ended server left there is swept at start

The same code serves both places; what differs is behind `Backing`.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from server.artifacts.backing import Backing, Entry, InsufficientStorage, StoreError
from server.artifacts.folder import Folder, no_space_named
from server.core import GatewayError

_DIGEST = re.compile(r"[0-9a-f]{64}")
_S3 = "s3://"


class BodyTooLarge(GatewayError):
    """More bytes than the limit allows."""


class Incoming:
    """A temporary file of the store that is hashed while it is written."""

    def __init__(self, path: Path, file: IO[bytes], max_bytes: int) -> None:
        self.path = path
        self.nbytes = 0
        self.max_bytes = max_bytes
        self._file = file
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """Blocking. Raises BodyTooLarge, InsufficientStorage."""
        self.nbytes += len(data)
        if self.nbytes > self.max_bytes:
            raise BodyTooLarge(f"the file is larger than the limit of {self.max_bytes} bytes")
        self._hash.update(data)
        with no_space_named():
            self._file.write(data)

    def sync(self) -> None:
        """Blocking. Everything written so far is on the disk after this."""
        with no_space_named():
            self._file.flush()
            os.fsync(self._file.fileno())


class Store:
    """Objects and refs of one place. `nbytes`: what its objects take, at most `max_bytes` where that is given."""

    def __init__(self, place: Path | Backing, max_bytes: int | None = None) -> None:
        backing = Folder(place) if isinstance(place, Path) else place
        self.root = backing.root
        self.place = backing.place
        self.nbytes = 0
        self._max_bytes = max_bytes
        self._backing = backing

    def open(self) -> None:
        """Raises StoreError."""
        self._backing.open()
        self.root = self._backing.root
        with self.exclusive():
            for leftover in (self.root / "incoming").iterdir():
                _sweep(leftover)
        self.nbytes = sum(entry.nbytes for entry in self._objects().values())

    def close(self) -> None:
        self._backing.close()

    def exclusive(self) -> AbstractContextManager[None]:
        """Keeps other servers from writing where the place can do that. Blocking; not to be nested."""
        return self._backing.exclusive()

    # Objects

    @contextlib.contextmanager
    def incoming(self, max_bytes: int) -> Iterator[Incoming]:
        """A temporary file that is gone when the block ends, unless it was published."""
        path, file = self._create()
        try:
            with file:
                yield Incoming(path, file, max_bytes)
        finally:
            path.unlink(missing_ok=True)

    def publish(self, incoming: Incoming) -> None:
        """Make sure that the synced bytes are there under their digest. Blocking, inside `exclusive`.

        Raises InsufficientStorage, StoreUnavailable.
        """
        if self._max_bytes is not None:
            there = self._objects()
            self.nbytes = sum(entry.nbytes for entry in there.values())
            if incoming.digest not in there and self.nbytes + incoming.nbytes > self._max_bytes:
                raise InsufficientStorage(
                    f"the store holds {self.nbytes} bytes and the file has {incoming.nbytes}; "
                    f"store.max_bytes is {self._max_bytes}"
                )
        if self._backing.put_object(incoming.path, incoming.digest):
            self.nbytes += incoming.nbytes

    def assure(self, incoming: Incoming) -> None:
        """Call it when a name refers to a published object: where servers have no lock, one may have dropped it just before."""
        self._backing.put_object(incoming.path, incoming.digest)

    def object_path(self, digest: str) -> Path:
        """Where the object lies as a local file, once it is fetched."""
        return self.root / "objects" / digest

    def fetch(self, digest: str) -> None:
        """Make an object a local file. Blocking. Raises StoreUnavailable."""
        self._backing.fetch_object(digest)

    def fetch_again(self, digest: str) -> None:
        """Read the object itself again, whatever is there locally. Blocking. Raises ObjectDamaged, StoreUnavailable."""
        self._backing.fetch_again(digest)

    def forget(self, digest: str) -> None:
        """Drop the local copy of an object that lies elsewhere. Blocking."""
        self._backing.forget_object(digest)

    def objects(self) -> list[str]:
        return sorted(self._objects())

    def keep_only(self, used: Collection[str]) -> None:
        """Drop the other objects. Blocking, inside `exclusive`."""
        local = {path.name for path in (self.root / "objects").iterdir() if _DIGEST.fullmatch(path.name)}
        there = self._objects()
        for digest in local | set(there):
            if digest not in used:
                self._backing.drop_object(digest)
                there.pop(digest, None)
        self.nbytes = sum(entry.nbytes for entry in there.values())

    def drop_object(self, digest: str) -> None:
        """Blocking, inside `exclusive`."""
        self._backing.drop_object(digest)
        self.nbytes = sum(entry.nbytes for entry in self._objects().values())

    # Refs

    def refs(self) -> Mapping[tuple[str, str], Entry]:
        """(kind, name) of every ref. Blocking. Raises StoreUnavailable."""
        return self._backing.refs()

    def read_ref(self, kind: str, name: str) -> tuple[bytes | None, str | None]:
        """Content (None where there is none) and the tag that `swap_ref` wants. Blocking. Raises StoreUnavailable."""
        return self._backing.read_ref(kind, name)

    def swap_ref(self, kind: str, name: str, content: bytes | None, tag: str | None) -> str | None:
        """Replace a ref that is still as it was read, or remove it; durable on return. Blocking, inside `exclusive`.

        Returns the new tag. Raises FileChanged, InsufficientStorage, StoreUnavailable.
        """
        if content is not None:
            return self._backing.swap_ref(kind, name, content, tag)
        if tag is not None:
            self._backing.remove_ref(kind, name, tag)
        return None

    def _objects(self) -> dict[str, Entry]:
        return {name: entry for name, entry in self._backing.objects().items() if _DIGEST.fullmatch(name)}

    def _create(self) -> tuple[Path, IO[bytes]]:
        """A file that is locked as long as it is open, so that no sweep takes it."""
        while True:
            with no_space_named():
                handle, name = tempfile.mkstemp(dir=self.root / "incoming")
            file = os.fdopen(handle, "wb", buffering=0)
            fcntl.flock(handle, fcntl.LOCK_EX)
            if os.fstat(handle).st_nlink:
                return Path(name), file
            file.close()  # swept before it was locked


def _sweep(leftover: Path) -> None:
    """Remove the file of an upload, unless a running server still holds it."""
    with contextlib.suppress(FileNotFoundError), leftover.open("rb") as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        leftover.unlink()


def backing(path: str, cache: Path, endpoint_url: str | None, max_cache_bytes: int | None) -> Backing:
    """The place that the settings name. Raises StoreError."""
    if not path.startswith(_S3):
        if "://" in path:
            raise StoreError(f"the store {path} is neither a folder nor {_S3}BUCKET/PREFIX")
        return Folder(Path(path))
    try:
        from server.artifacts.bucket import Bucket
    except ImportError as error:
        raise StoreError(f"a store in a bucket needs the extra s3: pip install 'deltaworks[s3]' ({error})") from error
    return Bucket(path, cache, endpoint_url, max_cache_bytes)
