"""The objects of a store and all registries over it; what other servers changed comes in here."""

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.artifacts.backing import Entry, StoreError
from server.artifacts.store import Store

if TYPE_CHECKING:
    from server.artifacts.names import Known, Registry
    from server.artifacts.versions import Ref

log = logging.getLogger("deltaworks.registry")


@dataclass(frozen=True)
class Followed:
    """What has changed since the last look: (kind, name) that are gone, and digests that no name refers to any more."""

    gone: frozenset[tuple[str, str]]
    unused: frozenset[str]


class Shelf:
    """`writing` is held by the one task of this server that changes refs; other servers are told apart by compare-and-swap."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.writing = asyncio.Lock()
        self._registries: list[Registry[Any]] = []
        self._gone: set[tuple[str, str]] = set()
        self._dropped: set[str] = set()

    def add(self, registry: "Registry[Any]") -> None:
        self._registries.append(registry)

    def note(self, kind: str, name: str, old: "Ref[Any] | None", new: "Ref[Any] | None") -> None:
        """Keep a change for the next look, whoever has made it."""
        if new is None:
            self._gone.add((kind, name))
        else:
            self._gone.discard((kind, name))
        if old is not None and old != new:
            self._dropped.update(version.digest for version in old.versions)

    def users(self, digest: str) -> set[tuple[str, str]]:
        """(kind, name) of all that refer to an object."""
        return {(registry.kind, name) for registry in self._registries for name in registry.names_of(digest)}

    def recover(self) -> None:
        """Read the names of all kinds, then drop objects that none refers to. Blocking. Raises StoreError, StoreUnavailable."""
        with self.store.exclusive():
            entries = self.store.refs()
            for registry, name, known in self._news(entries):
                registry.adopt(name, known)
            there = set(self.store.objects())
            for registry in self._registries:
                registry.check(there)
            if self._all_known(entries):
                self.store.keep_only({digest for registry in self._registries for digest in registry.digests()})
        for registry in self._registries:
            if registry.eager:
                for digest in registry.digests():
                    self.store.fetch(digest)

    async def follow(self) -> Followed:
        """Take over what other servers have written since the last look. Raises StoreUnavailable."""
        async with self.writing:
            news = await asyncio.to_thread(lambda: self._news(self.store.refs(), skip_damaged=True))
        before = [registry.known(name) for registry, name, _ in news]
        for registry, _, known in news:
            if registry.eager and known is not None:
                for version in known.ref.versions:
                    await asyncio.to_thread(self.store.fetch, version.digest)
        for (registry, name, known), old in zip(news, before, strict=True):
            if registry.known(name) is old:  # else it was changed here meanwhile: the next look says what holds
                registry.adopt(name, known)
        followed = Followed(
            frozenset(self._gone), frozenset(digest for digest in self._dropped if not self.users(digest))
        )
        self._gone.clear()
        self._dropped.clear()
        return followed

    async def sweep(self) -> None:
        """Drop all objects that no name has. Raises StoreUnavailable."""
        async with self.writing:
            unused = [digest for digest in await asyncio.to_thread(self.store.objects) if not self.users(digest)]
            await asyncio.to_thread(self.drop_unused, unused)

    def drop_unused(self, digests: Collection[str]) -> None:
        """Drop those of the objects that no name has, by what the store says now. Blocking, under `writing`."""
        with self.store.exclusive():
            entries = self.store.refs()
            if not self._all_known(entries):
                return
            news = {(registry.kind, name): known for registry, name, known in self._news(entries, skip_damaged=True)}
            for digest in digests:
                unchanged = any(user not in news for user in self.users(digest))
                if not unchanged and not any(known and known.ref.version(digest) for known in news.values()):
                    self.store.drop_object(digest)

    def _all_known(self, entries: Iterable[tuple[str, str]]) -> bool:
        foreign = {kind for kind, _ in entries} - {registry.kind for registry in self._registries}
        if foreign:  # written by a newer server: what they refer to is not ours to drop
            log.warning("kinds %s are unknown; unused objects are kept", ", ".join(sorted(foreign)))
        return not foreign

    def _news(
        self, entries: Mapping[tuple[str, str], Entry], skip_damaged: bool = False
    ) -> list[tuple["Registry[Any]", str, "Known[Any] | None"]]:
        """The names that are not what the registries know, None for one that is gone. Blocking."""
        found: list[tuple[Registry[Any], str, Known[Any] | None]] = []
        for registry in self._registries:
            mine = {name: entry for (kind, name), entry in entries.items() if kind == registry.kind}
            for name in sorted(mine.keys() | registry.names()):
                old, stamp = registry.known(name), mine[name].stamp if name in mine else ""
                if old is not None and stamp and stamp in (old.stamp, old.tag):
                    continue
                try:
                    known, _ = registry.read(name, stamp)
                except StoreError as error:
                    if not skip_damaged:
                        raise
                    log.error("%s", error)
                    continue
                if known is not None and old is not None and known.ref == old.ref:
                    registry.adopt(name, known)  # the same, with a stamp that spares the next look
                elif known is not old:
                    found.append((registry, name, known))
        return found
