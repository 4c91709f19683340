"""A bucket of an S3-compatible object store that servers share, through s3fs.

Refs are replaced by conditional writes (If-Match, If-None-Match), which every such store must have: `open` asks it. A removed
ref stays behind as an empty file, because a conditional delete is not as common. There is no lock, so an object that lost its last
name goes only when it has been there for longer than any upload takes, and an upload makes sure that its object is still there
after its ref is written. Objects are read through a local cache, which belongs to one server.
"""

import contextlib
import errno
import fcntl
import hashlib
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

from botocore.exceptions import BotoCoreError
from s3fs import S3FileSystem

from server.artifacts.backing import Entry, FileChanged, ObjectDamaged, StoreError, StoreUnavailable

UPLOAD_S = 3600.0  # no upload takes longer from its object to its ref
_CHUNK_BYTES = 16 << 20
_CONCURRENT_CHUNKS = 4
_MAX_CACHES = 64  # servers of one machine that may share a cache folder
_LOST = {"PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "404", "409", "412"}
_WRITER = "writer"


class Bucket:
    """`url` is s3://BUCKET/PREFIX; `cache` holds one numbered folder for each server of this machine."""

    def __init__(
        self, url: str, cache: Path, endpoint_url: str | None = None, max_cache_bytes: int | None = None
    ) -> None:
        self.place = url.rstrip("/")
        self.root = cache.expanduser().absolute()
        self._bucket, _, prefix = self.place.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._max_cache_bytes = max_cache_bytes
        self._lock: IO[str] | None = None
        self._files = S3FileSystem(endpoint_url=endpoint_url, use_listings_cache=False, skip_instance_cache=True)

    def open(self) -> None:
        self._take_cache()
        try:
            self._check_conditions()
        except (StoreUnavailable, FileChanged) as error:
            self.close()
            reason = error.__cause__ or "there is no such bucket"
            raise StoreError(f"cannot use the store {self.place}: {reason}") from error
        except StoreError:
            self.close()
            raise

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        yield

    def refs(self) -> dict[tuple[str, str], Entry]:
        found = {}
        for key, entry in self._list("refs/").items():
            kind, _, file = key.partition("/")
            if file.endswith(".json") and entry.nbytes:
                found[kind, file.removesuffix(".json")] = entry
        return found

    def read_ref(self, kind: str, name: str) -> tuple[bytes | None, str | None]:
        key = self._key(f"refs/{kind}/{name}.json")
        with _told():
            there = self._head(key)
            if there is None:
                return None, None
            content: bytes = self._files.cat_file(f"{self._bucket}/{key}")  # of that tag or newer: a swap then fails
        return content or None, str(there["ETag"])

    def swap_ref(self, kind: str, name: str, content: bytes, tag: str | None) -> str:
        return self._swap(self._key(f"refs/{kind}/{name}.json"), content, tag)

    def remove_ref(self, kind: str, name: str, tag: str) -> None:
        self.swap_ref(kind, name, b"", tag)

    def objects(self) -> dict[str, Entry]:
        return self._list("objects/")

    def put_object(self, file: Path, digest: str) -> bool:
        local, key = self.root / "objects" / digest, self._key(f"objects/{digest}")
        if file.exists():
            file.replace(local)
        with _told():
            there = self._head(key)
            if there and there["ContentLength"] == local.stat().st_size and _age_s(there) < UPLOAD_S / 2:
                return False
            self._files.put_file(
                str(local), f"{self._bucket}/{key}", chunksize=_CHUNK_BYTES, max_concurrency=_CONCURRENT_CHUNKS
            )
        return there is None

    def fetch_object(self, digest: str) -> None:
        local = self.root / "objects" / digest
        if local.exists():
            local.touch()
        else:
            self.fetch_again(digest)

    def fetch_again(self, digest: str) -> None:
        key = self._key(f"objects/{digest}")
        incoming = self.root / "incoming" / f"{digest}-{uuid.uuid4().hex}"
        try:
            with _told():
                if self._head(key) is None:
                    raise ObjectDamaged("the stored bytes are missing")
                self._files.get_file(
                    f"{self._bucket}/{key}",
                    str(incoming),
                    chunksize=_CHUNK_BYTES,
                    max_concurrency=_CONCURRENT_CHUNKS,
                )
            with incoming.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise ObjectDamaged("the stored bytes do not have the digest that they are called by")
            self._make_room(incoming.stat().st_size)
            incoming.replace(self.root / "objects" / digest)
        finally:
            incoming.unlink(missing_ok=True)

    def forget_object(self, digest: str) -> None:
        (self.root / "objects" / digest).unlink(missing_ok=True)

    def drop_object(self, digest: str) -> None:
        self.forget_object(digest)
        key = self._key(f"objects/{digest}")
        with _told():
            there = self._head(key)
            if there and _age_s(there) > UPLOAD_S:
                self._files.rm_file(f"{self._bucket}/{key}")

    def _key(self, path: str) -> str:
        return self._prefix + path

    def _head(self, key: str) -> dict[str, Any] | None:
        """None where there is no such file."""
        try:
            found: dict[str, Any] = self._files.call_s3("head_object", Bucket=self._bucket, Key=key)
        except FileNotFoundError:
            return None
        return found

    def _list(self, folder: str) -> dict[str, Entry]:
        top = f"{self._bucket}/{self._key(folder)}"
        with _told():
            infos = self._files.find(top, detail=True)
        # An empty prefix is looked up by its own name, as a folder, where its first file comes between the two requests.
        return {
            name.removeprefix(top): Entry(info["size"], str(info["ETag"]), _age_s(info))
            for name, info in infos.items()
            if info["type"] == "file"
        }

    def _swap(self, key: str, content: bytes, tag: str | None) -> str:
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        writer = uuid.uuid4().hex
        with _told():
            try:
                written = self._files.call_s3(
                    "put_object",
                    Bucket=self._bucket,
                    Key=key,
                    Body=content,
                    ContentType="application/json",
                    Metadata={_WRITER: writer},
                    **condition,
                )
                return str(written["ETag"])
            except OSError as error:
                if not isinstance(error, FileExistsError | FileNotFoundError) and _code(error) not in _LOST:
                    raise
            # The client sends a request again whose answer was lost: what was faster may be ourselves.
            there = self._head(key)
            if there and there["Metadata"].get(_WRITER) == writer:
                return str(there["ETag"])
        raise FileChanged(key)

    def _check_conditions(self) -> None:
        """Write a file of our own twice with a condition that must fail. Raises StoreError."""
        key = self._key(f"probe-{uuid.uuid4().hex}")
        try:
            tag = self._swap(key, b"1", None)
            for wrong in (None, f'"{"0" * 32}"'):
                with contextlib.suppress(FileChanged):
                    self._swap(key, b"2", wrong)
                    raise StoreError(
                        f"the store {self.place} ignores conditional writes (If-Match, If-None-Match), without which "
                        "servers would overwrite each other's changes"
                    )
            self._swap(key, b"3", tag)
        finally:
            with _told():
                self._files.call_s3("delete_object", Bucket=self._bucket, Key=key)

    def _take_cache(self) -> None:
        """The first numbered folder of the cache that no other server holds. Raises StoreError."""
        top = self.root
        try:
            for number in range(_MAX_CACHES):
                self.root = top / str(number)
                for folder in ("objects", "incoming"):
                    (self.root / folder).mkdir(parents=True, exist_ok=True)
                self._lock = (self.root / "lock").open("a")
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                self._lock.close()
        except OSError as error:
            raise StoreError(f"cannot use the cache folder {top}: {error.strerror}") from error
        raise StoreError(f"all {_MAX_CACHES} folders in {top} are in use; set store.cache_path")

    def _make_room(self, nbytes: int) -> None:
        """Drop the files of the cache that were asked for longest ago, but none that a load may be about to open."""
        if self._max_cache_bytes is None:
            return
        files = sorted((file.stat().st_mtime, file) for file in (self.root / "objects").iterdir())
        excess = nbytes + sum(file.stat().st_size for _, file in files) - self._max_cache_bytes
        for asked, file in files:
            if excess <= 0 or time.time() - asked < 60:
                return
            excess -= file.stat().st_size
            file.unlink()


def _age_s(info: Mapping[str, Any]) -> float:
    """Of a file, by what a listing or a head says of it."""
    age: timedelta = datetime.now(UTC) - info["LastModified"]
    return age.total_seconds()


def _code(error: OSError) -> str:
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn what the object store and the way to it may raise into StoreUnavailable."""
    try:
        yield
    except (OSError, BotoCoreError) as error:
        what = errno.errorcode.get(getattr(error, "errno", None) or 0, type(error).__name__)
        raise StoreUnavailable(f"the artifact store does not answer as it should ({what})", retry_after_s=5) from error
