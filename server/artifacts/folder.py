"""A local folder, or one that several servers mount: refs and objects are files, and `lock` keeps writers apart.

Everything visible is complete: a file is written beside its place, synced, renamed, and the folder synced.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from server.artifacts.backing import Entry, FileChanged, InsufficientStorage, ObjectDamaged, StoreError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Two changes within one tick of the file system's clock can leave the same inode, size and time behind.
_YOUNG_S = 2.0


class Folder:
    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.place = str(self.root)
        self._files = LocalFileSystem()

    def open(self) -> None:
        try:
            for folder in ("objects", "refs", "incoming"):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            with self.exclusive():
                for leftover in (self.root / "refs").glob("*/*.tmp"):
                    leftover.unlink()
        except OSError as error:
            raise StoreError(f"cannot use the store {self.root}: {error.strerror}") from error

    def close(self) -> None: ...

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        with (self.root / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def refs(self) -> dict[tuple[str, str], Entry]:
        found = {}
        for folder in (self.root / "refs").iterdir():
            if folder.is_dir():
                for name, entry in self._list(f"refs/{folder.name}").items():
                    if name.endswith(".json"):
                        found[folder.name, name.removesuffix(".json")] = entry
        return found

    def read_ref(self, kind: str, name: str) -> tuple[bytes | None, str | None]:
        try:
            content: bytes = self._files.cat_file(str(self._ref(kind, name)))
        except FileNotFoundError:
            return None, None
        return content, _tag(content)

    def swap_ref(self, kind: str, name: str, content: bytes, tag: str | None) -> str:
        self._expect(kind, name, tag)
        target = self._ref(kind, name)
        temporary = target.with_suffix(".tmp")
        with no_space_named():
            target.parent.mkdir(exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(target.parent)
        return _tag(content)

    def remove_ref(self, kind: str, name: str, tag: str) -> None:
        self._expect(kind, name, tag)
        target = self._ref(kind, name)
        target.unlink()
        with no_space_named():
            _sync_folder(target.parent)

    def objects(self) -> dict[str, Entry]:
        return self._list("objects")

    def put_object(self, file: Path, digest: str) -> bool:
        if not file.exists():
            return False
        target = self.root / "objects" / digest
        new = not target.exists()
        with no_space_named():
            file.replace(target)  # also where it is there already: that one may be damaged
            _sync_folder(target.parent)
        return new

    def fetch_object(self, digest: str) -> None: ...

    def fetch_again(self, digest: str) -> None:
        try:
            with (self.root / "objects" / digest).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise ObjectDamaged("the stored bytes do not have the digest that they are called by")
        except FileNotFoundError as error:
            raise ObjectDamaged("the stored bytes are missing") from error

    def forget_object(self, digest: str) -> None: ...

    def drop_object(self, digest: str) -> None:
        (self.root / "objects" / digest).unlink(missing_ok=True)

    def _ref(self, kind: str, name: str) -> Path:
        return self.root / "refs" / kind / f"{name}.json"

    def _expect(self, kind: str, name: str, tag: str | None) -> None:
        if self.read_ref(kind, name)[1] != tag:
            raise FileChanged(f"{kind} {name}")

    def _list(self, folder: str) -> dict[str, Entry]:
        now, found = time.time(), {}
        for info in self._files.ls(str(self.root / folder), detail=True):
            age_s = now - info["mtime"]
            stamp = f"{info['ino']}-{info['mtime']}-{info['size']}" if age_s > _YOUNG_S else ""
            found[Path(info["name"]).name] = Entry(info["size"], stamp, age_s)
        return found


@contextlib.contextmanager
def no_space_named() -> Iterator[None]:
    """Turn the operating system's no-space errors into InsufficientStorage."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise InsufficientStorage("no space left in the artifact store") from error
        raise


def _tag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
