"""Names: which digest a name of a kind points to, and which versions it has had. Durable; residency is the pools'."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic

from pydantic import ValidationError

from server.artifacts.combination import combination
from server.artifacts.reserve import check_reserve
from server.artifacts.store import Incoming, Store, StoreError
from server.artifacts.versions import DeltaVersion, Ref, V
from server.core import DeltaPart, GatewayError, InvalidRequest
from server.engine.base import EngineDelta, WeightedDelta

DELTA, PROFILE, SAE, POLICY = "delta", "profile", "sae", "policy"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
COMBINED = "combined"
MayUse = Callable[[str], bool]  # whether the caller may use a delta of that name
_METRIC_LABELS = ("base", "none", "other", COMBINED)  # what stands for no registered delta in the metrics

log = logging.getLogger("deltaworks.registry")


class InvalidName(GatewayError):
    """Not a name that an artifact may have."""


class ModelNotFound(GatewayError):
    """No base and no delta is called that; the message lists no other names."""


class KindError(GatewayError):
    """An error about an artifact of some kind; the kind begins its code."""

    def __init__(
        self, kind: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, param=param, retry_after_s=retry_after_s)
        self.kind = kind


class NameNotFound(KindError):
    """No artifact of that kind has the name, or it has no such version."""


class GenerationMismatch(KindError):
    """Somebody else moved the alias first; nothing was changed."""


class ArtifactBusy(KindError):
    """Another operation on the same name is under way."""


class Shelf:
    """The objects of a store and every registry that refers to them, whatever its kind. One writes at a time."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.writing = asyncio.Lock()
        self._registries: list[Registry[Any]] = []

    def add(self, registry: "Registry[Any]") -> None:
        self._registries.append(registry)

    def users(self, digest: str) -> set[tuple[str, str]]:
        """(kind, name) of all that refer to an object."""
        return {(registry.kind, name) for registry in self._registries for name in registry.names_of(digest)}

    def recover(self) -> None:
        """Read the names of all kinds back, then drop objects that none refers to. Blocking. Raises StoreError."""
        for registry in self._registries:
            registry.read()
        foreign = self.store.kinds() - {registry.kind for registry in self._registries}
        if foreign:  # written by a newer server: what they refer to is not ours to drop
            log.warning("kinds %s are unknown; unused objects are kept", ", ".join(sorted(foreign)))
            return
        for digest in self.store.objects():
            if not self.users(digest):
                self.store.delete_object(digest)

    async def drop_unused(self, digest: str) -> None:
        """Call it inside `writing`."""
        if not self.users(digest):
            await asyncio.to_thread(self.store.delete_object, digest)


class Registry(Generic[V]):
    """All names of one kind in memory, every change durable before it is visible."""

    def __init__(self, shelf: Shelf, kind: str, ref_type: type[Ref[V]], reserved: Collection[str] = ()) -> None:
        self.kind = kind
        self._shelf = shelf
        self._store = shelf.store
        self._ref_type = ref_type
        self._reserved = reserved
        self._refs: dict[str, Ref[V]] = {}
        self._retiring: dict[str, Ref[V]] = {}
        shelf.add(self)

    def read(self) -> None:
        """Read the names back. Blocking. Raises StoreError."""
        for name, content in self._store.refs(self.kind).items():
            try:
                self._refs[name] = self._ref_type.model_validate_json(content)
            except ValidationError as error:
                raise StoreError(f"{self._store.root}/refs/{self.kind}/{name}.json is damaged: {error}") from error
            for version in self._refs[name].versions:
                if not self._store.has_object(version.digest):
                    raise StoreError(f"the store lacks objects/{version.digest}, which {self.kind} {name!r} refers to")

    def refs(self) -> list[Ref[V]]:
        return [self._refs[name] for name in sorted(self._refs)]

    def get(self, name: str) -> Ref[V]:
        """Raises NameNotFound."""
        ref = self._refs.get(name)
        if ref is None:
            raise NameNotFound(self.kind, f"there is no {self.kind} of that name", param="name")
        return ref

    def active(self, name: str, param: str) -> V:
        """The version that a name points to; `param` is where a request names it. Raises NameNotFound."""
        ref = self._refs.get(name)
        version = ref.active() if ref else None
        if version is None:
            raise NameNotFound(self.kind, f"there is no {self.kind} of that name", param=param)
        return version

    def version(self, digest: str) -> V | None:
        """The version of that digest, whatever its name; None where no name has it."""
        found = (ref.version(digest) for ref in self._refs.values())
        return next((version for version in found if version is not None), None)

    def path(self, digest: str) -> str:
        return str(self._store.object_path(digest))

    def check_name(self, name: str) -> None:
        """Raises InvalidName."""
        if not _NAME.fullmatch(name):
            raise InvalidName(
                "a name has 1 to 128 letters, digits, dots, dashes and underscores, a letter or a digit first",
                param="name",
            )
        if name in self._reserved:
            raise InvalidName("that name belongs to the base or to the metrics; choose another", param="name")

    def check_generation(self, name: str, expected: int | None) -> None:
        """Raises GenerationMismatch. A name that does not exist yet has generation 0."""
        ref = self._refs.get(name)
        current = ref.generation if ref else 0
        if expected is not None and expected != current:
            message = f"the {self.kind} is at generation {current}, not {expected}"
            raise GenerationMismatch(self.kind, message, param="expected_generation")

    async def publish(
        self, name: str, version: V, incoming: Incoming, activate: bool, expected_generation: int | None
    ) -> tuple[Ref[V], bool]:
        """Add a verified version to a name, new or not; True when the name did not have it before.

        Raises GenerationMismatch, ArtifactBusy, InsufficientStorage; nothing is left behind then.
        """
        async with self._shelf.writing:
            self._check_idle(name)
            self.check_generation(name, expected_generation)
            old = self._refs.get(name) or self._ref_type(name=name, digest=None, generation=0, versions=())
            new = old
            created = old.version(version.digest) is None
            if created:
                new = old.model_copy(update={"versions": (*old.versions, version)})
            if activate:
                new = new.pointing_to(version.digest)
            try:
                if created and not self._shelf.users(version.digest):
                    await asyncio.to_thread(self._store.publish, incoming)
                if new != old:
                    await self._write(new)
            finally:
                await self._shelf.drop_unused(version.digest)
        return new, created

    async def move(self, name: str, digest: str, expected_generation: int) -> Ref[V]:
        """Point a name to another of its versions. Raises NameNotFound, GenerationMismatch, ArtifactBusy."""
        async with self._shelf.writing:
            self._check_idle(name)
            ref = self.get(name)
            self.check_generation(name, expected_generation)
            if ref.version(digest) is None:
                raise NameNotFound(self.kind, f"the {self.kind} has no version of that digest", param="digest")
            moved = ref.pointing_to(digest)
            await self._write(moved)
        return moved

    @asynccontextmanager
    async def retiring(self, name: str) -> AsyncIterator[Ref[V]]:
        """Hide a name while the block makes sure that nothing uses it, then forget it and its objects for good.

        If the block fails the name is back unchanged. Raises NameNotFound, ArtifactBusy.
        """
        self._check_idle(name)
        ref = self.get(name)
        del self._refs[name]
        self._retiring[name] = ref
        gone = False
        try:
            yield ref
            async with self._shelf.writing:
                await asyncio.to_thread(self._store.delete_ref, self.kind, name)
                gone = True
                del self._retiring[name]
                await asyncio.to_thread(self._store.sync_refs, self.kind)
                for version in ref.versions:
                    await self._shelf.drop_unused(version.digest)
        finally:
            if not gone:
                self._refs[name] = self._retiring.pop(name)

    def only_used_by(self, ref: Ref[V]) -> list[str]:
        """The digests among a name's versions that no other name refers to."""
        mine = {(self.kind, ref.name)}
        return [version.digest for version in ref.versions if self._shelf.users(version.digest) <= mine]

    def names_of(self, digest: str) -> set[str]:
        return {ref.name for ref in (*self._refs.values(), *self._retiring.values()) if ref.version(digest)}

    def _check_idle(self, name: str) -> None:
        if name in self._retiring:
            raise ArtifactBusy(self.kind, f"the {self.kind} is being deleted", param="name", retry_after_s=1)

    async def _write(self, ref: Ref[V]) -> None:
        content = ref.model_dump_json(indent=2).encode()
        await asyncio.to_thread(self._store.write_ref, self.kind, ref.name, content)
        self._refs[ref.name] = ref  # before the sync: should that fail, memory still says what the folder says
        await asyncio.to_thread(self._store.sync_refs, self.kind)


@dataclass(frozen=True)
class Resolved:
    """What a request means: the base (`delta` None), a delta at one digest, or a combination of `parts`, at theirs.

    NAME@`version` means the same, whatever happens to the name.
    """

    name: str
    delta: EngineDelta | None
    parts: tuple[DeltaPart, ...] = ()
    version: str | None = None


class DeltaRegistry(Registry[DeltaVersion]):
    """Deltas share one flat namespace with the base: both are what a request calls `model`.

    `reserved_tokens`: how many tokens a delta may add to the vocabulary, which was another number when it was uploaded, perhaps.
    """

    def __init__(self, shelf: Shelf, base_id: str, reserved_tokens: int = 0) -> None:
        super().__init__(shelf, DELTA, Ref[DeltaVersion], (base_id, *_METRIC_LABELS))
        self.base_id = base_id
        self._reserved_tokens = reserved_tokens

    def read(self) -> None:
        super().read()
        if self.base_id in self._refs:
            raise StoreError(f"the base is called {self.base_id!r} like a stored delta; set server.served_name")

    def resolve(self, model: str, may_use: MayUse) -> Resolved:
        """`model` is the base's id, or names a delta as `lookup` reads it. Raises ModelNotFound, ReserveExceeded."""
        return Resolved(self.base_id, None) if model == self.base_id else self._delta(model, "model", may_use)

    def lookup(self, model: str, param: str, may_use: MayUse) -> tuple[Ref[DeltaVersion], DeltaVersion]:
        """The name and version that NAME, BASE:NAME, NAME@VERSION or BASE:NAME@VERSION means; the first that there is.

        A delta that may not be used is as one that is not there. Raises ModelNotFound.
        """
        name = model.removeprefix(f"{self.base_id}:")
        start, _, wanted = name.rpartition("@")
        for ref, version in (
            (self._refs.get(model), None),
            (self._refs.get(name), None),
            (self._refs.get(start), wanted),
        ):
            if ref is not None and may_use(ref.name):
                found = ref.active() if version is None else ref.at(version)
                if found is not None:
                    return ref, found
        raise ModelNotFound("the model does not exist, or you have no access to it", param=param)

    def combine(self, model: str, parts: Sequence[DeltaPart], chat: bool, may_use: MayUse) -> Resolved:
        """The weighted sum of named deltas; one alone that counts once is that delta. `chat`: its template will be used.

        Raises ModelNotFound, InvalidRequest, ReserveExceeded.
        """
        if self.resolve(model, may_use).delta is not None:
            message = f"model names a delta, and so does delta; beside delta, model is the base, {self.base_id!r}"
            raise InvalidRequest(message, param="model")
        deltas: list[WeightedDelta] = []
        for i, part in enumerate(parts):
            one = self._delta(part.name, f"delta.{i}.name", may_use)
            assert one.delta is not None  # `_delta` finds no base
            if any(one.delta == other.delta for other in deltas):
                raise InvalidRequest("two names of one and the same delta; add up its weights", param=f"delta.{i}.name")
            if len(parts) == 1 and part.weight == 1:
                return one
            deltas.append(WeightedDelta(one.delta, part.weight))
        named = tuple(replace(part, digest=found.delta.digest) for part, found in zip(parts, deltas, strict=True))
        return Resolved(COMBINED, combination(deltas, chat), named)

    def _delta(self, model: str, param: str, may_use: MayUse) -> Resolved:
        """Raises ModelNotFound, ReserveExceeded."""
        ref, version = self.lookup(model, param, may_use)
        check_reserve(version.added_tokens, self._reserved_tokens)
        delta = replace(
            self.engine_delta(version.digest),
            chat_template=version.chat_template,
            stop_ids=version.stop_ids,
            added_tokens=version.added_tokens,
            tokenizer=version.tokenizer,
        )
        return Resolved(ref.name, delta, version=ref.label(version.digest))

    async def set_pinned(self, name: str, pinned: bool) -> Ref[DeltaVersion]:
        """Raises NameNotFound, ArtifactBusy."""
        async with self._shelf.writing:
            self._check_idle(name)
            ref = self.get(name)
            if ref.pinned != pinned:
                ref = ref.model_copy(update={"pinned": pinned})
                await self._write(ref)
        return ref

    def pinned(self) -> list[EngineDelta]:
        """What the pinned names point to."""
        digests = {ref.digest for ref in self._refs.values() if ref.pinned and ref.digest is not None}
        return [self.engine_delta(digest) for digest in sorted(digests)]

    def engine_delta(self, digest: str) -> EngineDelta:
        return EngineDelta(digest, self.path(digest))
