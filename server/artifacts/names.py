"""Names of one kind of artifact: which digest each points to, and which versions it has had. Durable; residency is the pools'."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeAlias

from pydantic import ValidationError

from server.artifacts.backing import FileChanged, InsufficientStorage, StoreError, StoreUnavailable
from server.artifacts.shelf import Shelf
from server.artifacts.store import Incoming
from server.artifacts.versions import Ref, V
from server.core import GatewayError
from server.wire import NAME_PATTERN

_NAME = re.compile(NAME_PATTERN)
_TRIES = 20
Change: TypeAlias = "Callable[[Ref[V] | None], Ref[V] | None]"


class InvalidName(GatewayError):
    """Not a name that an artifact may have."""


class KindError(GatewayError):
    """An error about an artifact of some kind; the kind begins its code."""

    def __init__(
        self, kind: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, param=param, retry_after_s=retry_after_s)
        self.kind = kind


class NameNotFound(KindError):
    """No artifact of that kind has the name, or it has no such version."""


class BaseMismatch(KindError):
    """The artifact was made for another base than the one that runs now."""


class GenerationMismatch(KindError):
    """Somebody else moved the alias first; nothing was changed."""


class ArtifactActive(KindError):
    """A name points to the version."""


class ArtifactBusy(KindError):
    """Another operation on the same name is under way."""


@dataclass(frozen=True)
class Known(Generic[V]):
    """A name as the store had it when it was last read or written; `stamp` and `tag` are the store's signs of that content."""

    ref: Ref[V]
    tag: str | None
    stamp: str = ""


class Registry(Generic[V]):
    """All names of one kind in memory, as this server or another wrote them; a change is durable before it is visible.

    `eager`: the bytes of every version are a local file before its name is seen.
    """

    def __init__(
        self, shelf: Shelf, kind: str, ref_type: type[Ref[V]], reserved: Collection[str] = (), eager: bool = True
    ) -> None:
        self.kind = kind
        self.eager = eager
        self._shelf = shelf
        self._store = shelf.store
        self._ref_type = ref_type
        self._reserved = reserved
        self._known: dict[str, Known[V]] = {}
        self._retiring: set[str] = set()
        shelf.add(self)

    # What the store says

    def read(self, name: str, stamp: str = "") -> tuple[Known[V] | None, str | None]:
        """A name as it is now, and the tag to change it with. Blocking. Raises StoreError, StoreUnavailable."""
        content, tag = self._store.read_ref(self.kind, name)
        if content is None:
            return None, tag
        try:
            return Known(self._ref_type.model_validate_json(content), tag, stamp), tag
        except ValidationError as error:
            raise StoreError(f"{self._store.place}/refs/{self.kind}/{name}.json is damaged: {error}") from error

    def known(self, name: str) -> Known[V] | None:
        return self._known.get(name)

    async def sync(self, name: str) -> None:
        """See what another server may just have made of a name. Raises StoreUnavailable."""
        if not _NAME.fullmatch(name):
            return
        async with self._shelf.writing:
            known, _ = await asyncio.to_thread(self.read, name)
            if known is not None and self.eager:
                for version in known.ref.versions:
                    await asyncio.to_thread(self._store.fetch, version.digest)
            self.adopt(name, known)

    def adopt(self, name: str, known: Known[V] | None) -> None:
        """Take over what the store has; None: it has no such name."""
        old = self._known.get(name)
        self._shelf.note(self.kind, name, old.ref if old else None, known.ref if known else None)
        if known is None:
            self._known.pop(name, None)
        else:
            self._known[name] = known

    def names(self) -> set[str]:
        return set(self._known)

    def used(self, digest: str) -> bool:
        """Whether a name of any kind refers to an object."""
        return bool(self._shelf.users(digest))

    def digests(self) -> set[str]:
        return {version.digest for known in list(self._known.values()) for version in known.ref.versions}

    def check(self, objects: Collection[str]) -> None:
        """Raises StoreError where a name refers to an object that the store lacks."""
        for name, known in self._known.items():
            for version in known.ref.versions:
                if version.digest not in objects:
                    raise StoreError(f"the store lacks objects/{version.digest}, which {self.kind} {name!r} refers to")

    # What a request may see

    def refs(self) -> list[Ref[V]]:
        return [self._known[name].ref for name in sorted(self._known) if name not in self._retiring]

    def find(self, name: str) -> Ref[V] | None:
        known = None if name in self._retiring else self._known.get(name)
        return known.ref if known else None

    def get(self, name: str) -> Ref[V]:
        """Raises NameNotFound."""
        ref = self.find(name)
        if ref is None:
            raise NameNotFound(self.kind, f"there is no {self.kind} of that name", param="name")
        return ref

    def active(self, name: str, param: str) -> V:
        """The version that a name points to; `param` is where a request names it. Raises NameNotFound."""
        ref = self.find(name)
        version = ref.active() if ref else None
        if version is None:
            raise NameNotFound(self.kind, f"there is no {self.kind} of that name", param=param)
        return version

    def version(self, digest: str) -> V | None:
        """The version of that digest, whatever its name; None where no name has it."""
        found = (ref.version(digest) for ref in self.refs())
        return next((version for version in found if version is not None), None)

    def path(self, digest: str) -> str:
        return str(self._store.object_path(digest))

    def names_of(self, digest: str) -> set[str]:
        return {name for name, known in list(self._known.items()) if known.ref.version(digest)}

    def only_used_by(self, ref: Ref[V]) -> list[str]:
        """The digests among a name's versions that no other name refers to."""
        mine = {(self.kind, ref.name)}
        return [version.digest for version in ref.versions if self._shelf.users(version.digest) <= mine]

    # Changes

    def check_name(self, name: str) -> None:
        """Raises InvalidName."""
        if not _NAME.fullmatch(name):
            raise InvalidName(
                "a name has 1 to 128 letters, digits, dots, dashes and underscores, a letter or a digit first",
                param="name",
            )
        if name in self._reserved:
            raise InvalidName("that name belongs to the base or to the metrics; choose another", param="name")

    def check_generation(self, ref: Ref[V] | None, expected: int | None) -> None:
        """Raises GenerationMismatch. A name that does not exist yet has generation 0."""
        current = ref.generation if ref else 0
        if expected is not None and expected != current:
            message = f"the {self.kind} is at generation {current}, not {expected}"
            raise GenerationMismatch(self.kind, message, param="expected_generation")

    async def publish(
        self, name: str, version: V, incoming: Incoming, activate: bool, expected_generation: int | None
    ) -> tuple[Ref[V], bool]:
        """Add a verified version to a name, new or not; True when the name did not have it before.

        Raises GenerationMismatch, ArtifactBusy, InsufficientStorage, StoreUnavailable; nothing is left behind then.
        """
        created = False

        def add(old: Ref[V] | None) -> Ref[V]:
            nonlocal created
            self.check_generation(old, expected_generation)
            new = old or self._ref_type(name=name, digest=None, generation=0, versions=())
            created = new.version(version.digest) is None
            if created:
                new = new.model_copy(update={"versions": (*new.versions, version)})
            return new.pointing_to(version.digest) if activate else new

        await asyncio.to_thread(incoming.sync)
        ref = self._existing(await self._change(name, add, incoming))
        return ref, created

    async def move(self, name: str, digest: str, expected_generation: int) -> Ref[V]:
        """Point a name to another of its versions. Raises NameNotFound, GenerationMismatch, ArtifactBusy."""

        def point(old: Ref[V] | None) -> Ref[V]:
            ref = self._existing(old)
            self.check_generation(ref, expected_generation)
            if ref.version(digest) is None:
                raise NameNotFound(self.kind, f"the {self.kind} has no version of that digest", param="digest")
            return ref.pointing_to(digest)

        return self._existing(await self._change(name, point))

    async def remove(self, name: str, digest: str) -> None:
        """Forget a version to which the name does not point, and its object. Raises NameNotFound, ArtifactActive, ArtifactBusy."""

        def without(old: Ref[V] | None) -> Ref[V] | None:
            ref = self._existing(old)
            self.check_version(ref, digest)
            left = tuple(version for version in ref.versions if version.digest != digest)
            return ref.model_copy(update={"versions": left}) if left else None

        await self._change(name, without)
        async with self._shelf.writing:
            await asyncio.to_thread(self._shelf.drop_unused, [digest])

    def check_version(self, ref: Ref[V], digest: str) -> None:
        """Whether a version may go. Raises NameNotFound, ArtifactActive."""
        if ref.version(digest) is None:
            raise NameNotFound(self.kind, f"the {self.kind} has no version of that digest", param="digest")
        if ref.digest == digest:
            raise ArtifactActive(self.kind, "the name points to that version; move the alias first", param="digest")

    @asynccontextmanager
    async def retiring(self, name: str) -> AsyncIterator[Ref[V]]:
        """Hide a name while the block makes sure that nothing uses it, then forget it and its objects for good.

        If the block fails the name is back unchanged. Raises NameNotFound, ArtifactBusy, and GenerationMismatch where
        somebody changed it meanwhile.
        """
        self._check_idle(name)
        ref = self.get(name)

        def forget(old: Ref[V] | None) -> None:
            if old not in (None, ref):
                raise GenerationMismatch(
                    self.kind, f"the {self.kind} was changed while it was being deleted", param="name"
                )

        self._retiring.add(name)
        try:
            yield ref
            async with self._shelf.writing:
                await asyncio.to_thread(self._commit, name, forget)
                self.adopt(name, None)
                await asyncio.to_thread(self._shelf.drop_unused, [version.digest for version in ref.versions])
        finally:
            self._retiring.discard(name)

    async def _change(self, name: str, change: "Change[V]", incoming: Incoming | None = None) -> Ref[V] | None:
        """Replace a name by what `change` makes of it, None for nothing. Raises ArtifactBusy, and what `change` raises."""
        async with self._shelf.writing:
            self._check_idle(name)
            try:
                known = await asyncio.to_thread(self._commit, name, change, incoming)
            except (InsufficientStorage, StoreUnavailable, ArtifactBusy):
                if incoming is not None:
                    await asyncio.to_thread(self._shelf.drop_unused, [incoming.digest])
                raise
            self.adopt(name, known)
        return known.ref if known else None

    def _commit(self, name: str, change: "Change[V]", incoming: Incoming | None = None) -> Known[V] | None:
        """Read, change, write, and again where another server was faster; `incoming` is there before a name says so. Blocking."""
        for _ in range(_TRIES):
            with self._store.exclusive():
                old, tag = self.read(name)
                new = change(old.ref if old else None)
                if incoming is not None:
                    self._store.publish(incoming)
                if new == (old.ref if old else None):
                    return old
                try:
                    tag = self._store.swap_ref(self.kind, name, _content(new), tag)
                except FileChanged:
                    continue
                if incoming is not None:
                    self._store.assure(incoming)
                return Known(new, tag) if new else None
        raise ArtifactBusy(self.kind, f"other servers keep changing the {self.kind}", param="name", retry_after_s=1)

    def _existing(self, ref: Ref[V] | None) -> Ref[V]:
        """Raises NameNotFound."""
        if ref is None:
            raise NameNotFound(self.kind, f"there is no {self.kind} of that name", param="name")
        return ref

    def _check_idle(self, name: str) -> None:
        if name in self._retiring:
            raise ArtifactBusy(self.kind, f"the {self.kind} is being deleted", param="name", retry_after_s=1)


def _content(ref: Ref[V] | None) -> bytes | None:
    return ref.model_dump_json(indent=2).encode() if ref else None
