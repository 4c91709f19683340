"""The life of an artifact on the server: uploaded, named, warmed, dropped, deleted. Joins store, registry and pool."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol

from compressors.errors import DeltaError
from server.artifacts.archive import FACTS, InvalidArchive, is_archive, unpack
from server.artifacts.backing import ObjectDamaged
from server.artifacts.cards import Verification, VersionCheck
from server.artifacts.delta_pool import DeltaPool
from server.artifacts.names import ArtifactBusy, KindError, NameNotFound, Registry
from server.artifacts.pool import ArtifactInUse, Users
from server.artifacts.registry import DeltaRegistry
from server.artifacts.shelf import Followed
from server.artifacts.store import Incoming, Store
from server.artifacts.versions import DeltaVersion, PolicyVersion, ProfileVersion, Ref, V
from server.core import GatewayError
from server.engine.base import EngineDelta
from server.metrics.residency import Census
from server.telemetry import Telemetry
from server.wire import UploadFields, check
from steering.errors import SteeringError


class Received(Protocol):
    """A file to check: an upload, or an object of the store."""

    @property
    def path(self) -> Path: ...

    @property
    def digest(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class Stored:
    path: Path
    digest: str
    nbytes: int


# A received file -> what is durable about it, or the error that says what is wrong with it. Blocking.
Check = Callable[[Received], V]


class DigestMismatch(GatewayError):
    """The bytes that arrived are not the ones that were announced."""


class WrongBase(KindError):
    """The upload says that it is for another base than the running one."""


class ArtifactPinned(KindError):
    """A pinned artifact cannot leave the memory."""


def check_digest(fields: UploadFields, incoming: Incoming) -> None:
    """Raises DigestMismatch."""
    if incoming.digest != fields.sha256:
        raise DigestMismatch(f"received {incoming.nbytes} bytes with sha256 {incoming.digest}", param="sha256")


class Lifecycle(Generic[V]):
    """One kind of artifact, as the admin plane handles it."""

    def __init__(
        self,
        store: Store,
        registry: Registry[V],
        users: Users,
        check: Check[V],
        telemetry: Telemetry,
        drain_timeout_s: float,
    ) -> None:
        self.kind = registry.kind
        self._store = store
        self._registry = registry
        self._users = users
        self._check = check
        self._telemetry = telemetry
        self._drain_timeout_s = drain_timeout_s
        self._checking = asyncio.Lock()  # one at a time: a check maps a whole file
        self._uploading: set[str] = set()  # names whose upload is being checked
        self._failed: set[str] = set()  # digests whose bytes were found to be bad

    def incoming(self, max_bytes: int) -> AbstractContextManager[Incoming]:
        return self._store.incoming(max_bytes)

    @asynccontextmanager
    async def opened(self, fields: UploadFields, incoming: Incoming) -> AsyncIterator[tuple[UploadFields, Incoming]]:
        """The artifact of an upload, and what is said of it."""
        yield fields, incoming

    async def upload(self, fields: UploadFields, incoming: Incoming) -> tuple[Ref[V], bool]:
        """Check the received file and put it under its name; True when the name has a new version.

        Raises DigestMismatch, InvalidName, GenerationMismatch, WrongBase, ArtifactBusy, InsufficientStorage and what the
        check raises (DeltaError, SteeringError); nothing stays then.
        """
        self._registry.check_name(fields.name)
        self._registry.check_generation(self._registry.find(fields.name), fields.expected_generation)
        check_digest(fields, incoming)
        with self._alone(fields.name):
            async with self._checking:
                version = await asyncio.to_thread(self._check, incoming)
            self._check_base(fields, version)
            if fields.description:
                version = version.model_copy(update={"description": fields.description})
            ref, created = await self._registry.publish(
                fields.name, version, incoming, fields.activate, fields.expected_generation
            )
        self._clear(incoming.digest)
        self.count_upload("created" if created else "identical")
        return ref, created

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """One upload of a name at a time. Raises ArtifactBusy."""
        if name in self._uploading:
            message = f"another upload of that {self.kind} is being checked"
            raise ArtifactBusy(self.kind, message, param="name", retry_after_s=1)
        self._uploading.add(name)
        try:
            yield
        finally:
            self._uploading.discard(name)

    def _check_base(self, fields: UploadFields, version: V) -> None:
        """Raises WrongBase where the upload names another base than the one that its file was checked against."""
        said, found = fields.base_fingerprint, getattr(version, "base_fingerprint", None)
        if said is not None and said != found:
            message = f"the {self.kind} is for base {found}, not {said[:100]}"
            raise WrongBase(self.kind, message, param="base_fingerprint")

    async def verify(self, name: str) -> Verification:
        """Read and check every version of a name again, as at its upload. Raises NameNotFound, StoreUnavailable."""
        checks: list[VersionCheck] = []
        for version in (await self.get(name)).versions:
            async with self._checking:
                problem = await asyncio.to_thread(self._recheck, version)
            if problem is None:
                self._clear(version.digest)
            else:
                self._fail(version.digest, problem)
            checks.append({"digest": version.digest, "ok": problem is None, "problem": problem})
        return {
            "object": f"{self.kind}.verification",
            "name": name,
            "ok": all(c["ok"] for c in checks),
            "checks": checks,
        }

    def _recheck(self, version: V) -> str | None:
        """What is wrong with a stored version. Blocking."""
        path = self._store.object_path(version.digest)
        try:
            self._store.fetch_again(version.digest)
            found = self._check(Stored(path, version.digest, path.stat().st_size))
        except (ObjectDamaged, DeltaError, SteeringError) as error:
            return str(error)
        return None if found.nbytes == version.nbytes else f"{found.nbytes} bytes, not {version.nbytes}"

    def _fail(self, digest: str, problem: str) -> None:
        self._failed.add(digest)

    def _clear(self, digest: str) -> None:
        self._failed.discard(digest)

    async def delete_version(self, name: str, digest: str, drain: bool) -> None:
        """Forget one version to which the name does not point. Raises NameNotFound, ArtifactActive, ArtifactBusy, ArtifactInUse."""
        ref = await self.get(name)
        self._registry.check_version(ref, digest)
        if digest in self._registry.only_used_by(ref):
            await self._users.release(self.kind, [digest], self._drain_timeout_s if drain else 0)
        await self._registry.remove(name, digest)

    def count_upload(self, outcome: str, reason: str = "none") -> None:
        self._telemetry.uploads[self.kind].ended(outcome, reason)

    def count_received(self, nbytes: int, seconds: float) -> None:
        self._telemetry.uploads[self.kind].received(nbytes, seconds)

    def check_name(self, name: str) -> None:
        """Raises InvalidName."""
        self._registry.check_name(name)

    def refs(self) -> list[Ref[V]]:
        return self._registry.refs()

    async def get(self, name: str) -> Ref[V]:
        """What the store says now. Raises NameNotFound, StoreUnavailable."""
        await self._registry.sync(name)
        return self._registry.get(name)

    async def version(self, name: str, digest: str) -> V:
        """Raises NameNotFound, StoreUnavailable."""
        version = (await self.get(name)).version(digest)
        if version is None:
            raise NameNotFound(self.kind, f"the {self.kind} has no version of that digest", param="digest")
        return version

    async def move(self, name: str, digest: str, expected_generation: int) -> Ref[V]:
        """Raises NameNotFound, GenerationMismatch, ArtifactBusy."""
        return await self._registry.move(name, digest, expected_generation)

    async def delete(self, name: str, drain: bool) -> None:
        """Forget a name, and the bytes that only it used. Raises NameNotFound, ArtifactBusy, ArtifactInUse."""
        await self._registry.sync(name)
        async with self._registry.retiring(name) as ref:
            digests = self._registry.only_used_by(ref)
            await self._users.release(self.kind, digests, self._drain_timeout_s if drain else 0)

    def card(self, ref: Ref[V]) -> dict[str, Any]:
        """A name and its versions as the admin plane shows them."""
        versions = [self.version_card(version) for version in ref.versions]
        return {
            "object": self.kind,
            "name": ref.name,
            "digest": ref.digest,
            "generation": ref.generation,
            "versions": versions,
        }

    def version_card(self, version: V) -> dict[str, Any]:
        failed = {"state": "failed"} if version.digest in self._failed else {}
        return {**version.model_dump(mode="json"), **self._users.usage(version.digest), **failed}


class ProfileLifecycle(Lifecycle[ProfileVersion]):
    """A profile whose probe a policy of the tool gate reads stays as long as that policy."""

    def __init__(
        self,
        store: Store,
        registry: Registry[ProfileVersion],
        users: Users,
        check: Check[ProfileVersion],
        telemetry: Telemetry,
        drain_timeout_s: float,
        policies: Registry[PolicyVersion],
    ) -> None:
        super().__init__(store, registry, users, check, telemetry, drain_timeout_s)
        self._policies = policies

    async def delete(self, name: str, drain: bool) -> None:
        """Raises ArtifactInUse for a profile that a policy names too."""
        going = set(self._registry.only_used_by(await self.get(name)))
        for policy in self._policies.refs():
            if going & {version.hidden_profile for version in policy.versions}:
                message = f"the policy {policy.name!r} reads this profile's probe; delete the policy first"
                raise ArtifactInUse(self.kind, message, param="name")
        await super().delete(name, drain)


class DeltaLifecycle(Lifecycle[DeltaVersion]):
    """Deltas can also be loaded, unloaded and pinned by hand, and have series of their own in the metrics."""

    def __init__(
        self,
        store: Store,
        registry: DeltaRegistry,
        pool: DeltaPool,
        check: Check[DeltaVersion],
        telemetry: Telemetry,
        drain_timeout_s: float,
    ) -> None:
        super().__init__(store, registry, pool, check, telemetry, drain_timeout_s)
        self._deltas = registry
        self._pool = pool
        telemetry.deltas.watch(self._census)
        self._leaving: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def opened(self, fields: UploadFields, incoming: Incoming) -> AsyncIterator[tuple[UploadFields, Incoming]]:
        """Also of one that is an archive. Raises DigestMismatch, InvalidArchive, BodyTooLarge, InsufficientStorage."""
        if not await asyncio.to_thread(is_archive, incoming.path):
            yield fields, incoming
            return
        check_digest(fields, incoming)
        with self.incoming(incoming.max_bytes) as unpacked:
            facts = await asyncio.to_thread(unpack, incoming.path, unpacked)
            said = facts | {name: value for name in FACTS if (value := getattr(fields, name))}
            if facts.get("base_fingerprint") != said.get("base_fingerprint") and "base_fingerprint" in facts:
                raise InvalidArchive("the form and the archive name different bases", param="base_fingerprint")
            yield check(UploadFields, {**fields.model_dump(), **said, "sha256": unpacked.digest}), unpacked

    async def upload(self, fields: UploadFields, incoming: Incoming) -> tuple[Ref[DeltaVersion], bool]:
        ref, created = await super().upload(fields, incoming)
        self._keep_pinned(ref)
        return ref, created

    async def move(self, name: str, digest: str, expected_generation: int) -> Ref[DeltaVersion]:
        ref = await super().move(name, digest, expected_generation)
        self._keep_pinned(ref)
        return ref

    async def load(self, name: str) -> Ref[DeltaVersion]:
        """Make the active version resident. Raises NameNotFound, NoCapacity, DeltaTooLarge, EngineLoadError."""
        ref = await self.get(name)
        await self._pool.load(self._active(ref))
        return ref

    async def unload(self, name: str) -> Ref[DeltaVersion]:
        """Take every version out of memory, packed or not. Raises NameNotFound, ArtifactPinned, ArtifactInUse."""
        ref = await self.get(name)
        if any(self._pool.pinned(version.digest) for version in ref.versions):
            raise ArtifactPinned(self.kind, "the delta is pinned; unpin it first", param="name")
        await self._pool.drop([version.digest for version in ref.versions], wait_s=0)
        return ref

    async def pin(self, name: str) -> Ref[DeltaVersion]:
        """Load what the name points to, now and later, and keep it. Raises PinLimit, and as `load`."""
        delta = self._active(await self.get(name))
        await self._pool.check_pin(delta)
        await self._pool.load(delta)
        ref = await self._deltas.set_pinned(name, True)
        self._pool.keep(self._deltas.pinned())
        return ref

    async def unpin(self, name: str) -> Ref[DeltaVersion]:
        """It may be evicted again. Raises NameNotFound."""
        ref = await self._deltas.set_pinned(name, False)
        self._pool.keep(self._deltas.pinned())
        return ref

    async def delete(self, name: str, drain: bool) -> None:
        await super().delete(name, drain)
        self._pool.keep(self._deltas.pinned())
        self._telemetry.forget_delta(name)

    def _fail(self, digest: str, problem: str) -> None:
        super()._fail(digest, problem)
        self._pool.condemn(digest, problem)

    def _clear(self, digest: str) -> None:
        super()._clear(digest)
        self._pool.forgive(digest)

    def followed(self, seen: Followed) -> None:
        """Act on what other servers may have done: pins, and deltas that are gone."""
        pins = self._deltas.pinned()
        if {delta.digest for delta in pins} != self._pool.pins:
            self._pool.keep(pins)
        for kind, name in seen.gone:
            if kind == self.kind:
                self._telemetry.forget_delta(name)
        for digest in seen.unused:
            task = asyncio.create_task(self._leave(digest))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _leave(self, digest: str) -> None:
        with suppress(ArtifactInUse):  # it leaves like any that is not wanted any more
            await self._pool.drop([digest], self._drain_timeout_s)
            if not self._deltas.used(digest):
                await asyncio.to_thread(self._store.forget, digest)

    def card(self, ref: Ref[DeltaVersion]) -> dict[str, Any]:
        return {**super().card(ref), "pinned": ref.pinned}

    def _census(self) -> Census:
        """What the metrics say of every name."""
        refs, pool = self.refs(), self._pool
        states = {"active": 0, "disabled": 0, "failed": 0}
        levels = {
            "engine": {one.item.digest for one in pool.residents() if one.nbytes is not None},
            "ram": set(pool.packed.digests()),
        }
        for ref in refs:
            state = "disabled" if ref.digest is None else pool.state(ref.digest)[0]
            states[state if state in states else "active"] += 1
        old = {one.digest for ref in refs for one in ref.versions} - {ref.digest for ref in refs}
        return Census(
            states,
            sum(pool.leases(digest) > 0 for digest in old),
            {ref.name: tuple(level for level, held in levels.items() if ref.digest in held) for ref in refs},
        )

    def _active(self, ref: Ref[DeltaVersion]) -> EngineDelta:
        """Raises NameNotFound."""
        if ref.digest is None:
            raise NameNotFound(self.kind, "the delta has no active version; move its alias first", param="name")
        return self._deltas.engine_delta(ref.digest)

    def _keep_pinned(self, ref: Ref[DeltaVersion]) -> None:
        """A pinned name may point elsewhere now."""
        if ref.pinned:
            self._pool.keep(self._deltas.pinned())
