"""What a store asks of the place where its files lie: a local folder (folder.py), or an S3-compatible bucket (bucket.py)."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from server.core import GatewayError


class StoreError(Exception):
    """The store cannot be used at all; ends the start of the server."""


class StoreUnavailable(GatewayError):
    """The place of the store did not do what it was asked for; it may later."""


class ObjectDamaged(StoreUnavailable):
    """The bytes of an object are not the ones that it is called by."""


class InsufficientStorage(GatewayError):
    """No space left in the store."""


class FileChanged(Exception):
    """A ref is no longer the one that was read; nothing was written."""


@dataclass(frozen=True)
class Entry:
    """A file as a listing shows it. `stamp` differs where the content does; "" = it is too young to tell."""

    nbytes: int
    stamp: str
    age_s: float


class Backing(Protocol):
    """Refs, small and changed by compare-and-swap, and objects, large and never changed. All methods block.

    Raises StoreUnavailable, InsufficientStorage everywhere but in `open`, which raises StoreError.
    """

    root: Path  # a local folder with `incoming/` and `objects/`
    place: str  # for messages

    def open(self) -> None: ...

    def close(self) -> None: ...

    def exclusive(self) -> AbstractContextManager[None]:
        """Where the place can keep other servers out, they are, inside the block."""
        ...

    def refs(self) -> Mapping[tuple[str, str], Entry]:
        """(kind, name) of every ref."""
        ...

    def read_ref(self, kind: str, name: str) -> tuple[bytes | None, str | None]:
        """Content and tag; both None where there has never been one, the content alone where it was removed."""
        ...

    def swap_ref(self, kind: str, name: str, content: bytes, tag: str | None) -> str:
        """Replace what `read_ref` gave in one durable step; returns the new tag. Call it inside `exclusive`.

        Raises FileChanged where somebody else was faster.
        """
        ...

    def remove_ref(self, kind: str, name: str, tag: str) -> None:
        """As `swap_ref`."""
        ...

    def objects(self) -> Mapping[str, Entry]:
        """All objects by digest, wherever they lie."""
        ...

    def put_object(self, file: Path, digest: str) -> bool:
        """Take over a synced file of `incoming/`, or make sure that one which was taken over is there; True where it is new."""
        ...

    def fetch_object(self, digest: str) -> None:
        """Make `objects/<digest>` a local file, where it is not. Raises ObjectDamaged."""
        ...

    def fetch_again(self, digest: str) -> None:
        """As `fetch_object`, in place of a local copy. Raises ObjectDamaged."""
        ...

    def forget_object(self, digest: str) -> None:
        """Drop a local copy that is not the object itself."""
        ...

    def drop_object(self, digest: str) -> None:
        """Delete an object to which nothing refers, at once or as soon as no upload can be counting on it."""
        ...
