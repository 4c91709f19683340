"""Names: which digest a delta's name points to, and which versions it has had. Durable; residency is the pool's."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from server.artifacts.store import Incoming, Store, StoreError
from server.core import GatewayError
from server.engine.base import EngineDelta

KIND = "delta"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RESERVED = ("base", "none", "other")  # label values of the metrics


class InvalidName(GatewayError):
    """Not a name that a delta may have."""


class ModelNotFound(GatewayError):
    """No base and no delta is called that; the message lists no other names."""


class DeltaNotFound(GatewayError):
    """The admin plane's counterpart of ModelNotFound."""


class GenerationMismatch(GatewayError):
    """Somebody else moved the alias first; nothing was changed."""


class DeltaBusy(GatewayError):
    """Another operation on the same name is under way."""


class Version(BaseModel):
    """One uploaded artifact under a name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    nbytes: int
    created: int  # unix seconds
    method: str
    base_fingerprint: str
    ratio: float
    checks: tuple[str, ...]


class Ref(BaseModel):
    """A name: `digest` is what it points to (None = nothing yet), `generation` counts the moves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    name: str
    digest: str | None
    generation: int
    versions: tuple[Version, ...]

    def version(self, digest: str) -> Version | None:
        return next((version for version in self.versions if version.digest == digest), None)

    def pointing_to(self, digest: str) -> "Ref":
        if digest == self.digest:
            return self
        return self.model_copy(update={"digest": digest, "generation": self.generation + 1})


@dataclass(frozen=True)
class Resolved:
    """What a request's `model` means: the base (`delta` None), or a delta at one digest."""

    name: str
    delta: EngineDelta | None


class Registry:
    """All names in memory, every change durable before it is visible."""

    def __init__(self, store: Store, base_id: str) -> None:
        self.base_id = base_id
        self._store = store
        self._refs: dict[str, Ref] = {}
        self._retiring: dict[str, Ref] = {}
        self._writing = asyncio.Lock()

    def recover(self) -> None:
        """Read the names back and drop objects that no name refers to. Blocking. Raises StoreError."""
        for name, content in self._store.refs(KIND).items():
            try:
                self._refs[name] = Ref.model_validate_json(content)
            except ValidationError as error:
                raise StoreError(f"{self._store.root}/refs/{KIND}/{name}.json is damaged: {error}") from error
            for version in self._refs[name].versions:
                if not self._store.has_object(version.digest):
                    raise StoreError(f"the store lacks objects/{version.digest}, which delta {name!r} refers to")
        if self.base_id in self._refs:
            raise StoreError(f"the base is called {self.base_id!r} like a stored delta; set server.served_name")
        for digest in self._store.objects():
            if not self._users(digest):
                self._store.delete_object(digest)

    def resolve(self, model: str) -> Resolved:
        """Raises ModelNotFound."""
        if model == self.base_id:
            return Resolved(self.base_id, None)
        ref = self._refs.get(model)
        if ref is None or ref.digest is None:
            raise ModelNotFound("the model does not exist, or you have no access to it", param="model")
        return Resolved(ref.name, self.engine_delta(ref.digest))

    def engine_delta(self, digest: str) -> EngineDelta:
        return EngineDelta(digest, str(self._store.object_path(digest)))

    def refs(self) -> list[Ref]:
        return [self._refs[name] for name in sorted(self._refs)]

    def get(self, name: str) -> Ref:
        """Raises DeltaNotFound."""
        ref = self._refs.get(name)
        if ref is None:
            raise DeltaNotFound("there is no delta of that name", param="name")
        return ref

    def check_name(self, name: str) -> None:
        """Raises InvalidName."""
        if not _NAME.fullmatch(name):
            raise InvalidName(
                "a delta's name has 1 to 128 characters, letters, digits, '.', '_' and '-', a letter or digit first",
                param="name",
            )
        if name == self.base_id or name in _RESERVED:
            raise InvalidName("that name belongs to the base or to the metrics; choose another", param="name")

    def check_generation(self, name: str, expected: int | None) -> None:
        """Raises GenerationMismatch. A name that does not exist yet has generation 0."""
        ref = self._refs.get(name)
        current = ref.generation if ref else 0
        if expected is not None and expected != current:
            raise GenerationMismatch(
                f"the delta is at generation {current}, not {expected}", param="expected_generation"
            )

    async def publish(
        self, name: str, version: Version, incoming: Incoming, activate: bool, expected_generation: int | None
    ) -> tuple[Ref, bool]:
        """Add a verified version to a name, new or not; True when the name did not have it before.

        Raises GenerationMismatch, InsufficientStorage; nothing is left behind then.
        """
        async with self._writing:
            self._check_idle(name)
            self.check_generation(name, expected_generation)
            old = self._refs.get(name) or Ref(name=name, digest=None, generation=0, versions=())
            new = old
            created = old.version(version.digest) is None
            if created:
                new = old.model_copy(update={"versions": (*old.versions, version)})
            if activate:
                new = new.pointing_to(version.digest)
            try:
                if created and not self._users(version.digest):
                    await asyncio.to_thread(self._store.publish, incoming)
                if new != old:
                    await self._write(new)
            finally:
                if not self._users(version.digest):
                    await asyncio.to_thread(self._store.delete_object, version.digest)
        return new, created

    async def move(self, name: str, digest: str, expected_generation: int) -> Ref:
        """Point a name to another of its versions. Raises DeltaNotFound, GenerationMismatch."""
        async with self._writing:
            self._check_idle(name)
            ref = self.get(name)
            self.check_generation(name, expected_generation)
            if ref.version(digest) is None:
                raise DeltaNotFound("the delta has no version of that digest", param="digest")
            moved = ref.pointing_to(digest)
            await self._write(moved)
        return moved

    @asynccontextmanager
    async def retiring(self, name: str) -> AsyncIterator[Ref]:
        """Hide a name while the block makes sure that nothing uses it, then forget it and its objects for good.

        If the block fails the name is back unchanged. Raises DeltaNotFound, DeltaBusy.
        """
        self._check_idle(name)
        ref = self.get(name)
        del self._refs[name]
        self._retiring[name] = ref
        gone = False
        try:
            yield ref
            async with self._writing:
                await asyncio.to_thread(self._store.delete_ref, KIND, name)
                gone = True
                del self._retiring[name]
                await asyncio.to_thread(self._store.sync_refs, KIND)
                for version in ref.versions:
                    if not self._users(version.digest):
                        await asyncio.to_thread(self._store.delete_object, version.digest)
        finally:
            if not gone:
                self._refs[name] = self._retiring.pop(name)

    def only_used_by(self, ref: Ref) -> list[str]:
        """The digests among a name's versions that no other name refers to."""
        return [version.digest for version in ref.versions if self._users(version.digest) <= {ref.name}]

    def _users(self, digest: str) -> set[str]:
        return {ref.name for ref in (*self._refs.values(), *self._retiring.values()) if ref.version(digest)}

    def _check_idle(self, name: str) -> None:
        if name in self._retiring:
            raise DeltaBusy("the delta is being deleted", param="name", retry_after_s=1)

    async def _write(self, ref: Ref) -> None:
        content = ref.model_dump_json(indent=2).encode()
        await asyncio.to_thread(self._store.write_ref, KIND, ref.name, content)
        self._refs[ref.name] = ref  # before the sync: should that fail, memory still says what the folder says
        await asyncio.to_thread(self._store.sync_refs, KIND)
