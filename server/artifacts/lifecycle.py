"""The life of an artifact on the server: uploaded, named, warmed, dropped, deleted. Joins store, registry and pool."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Generic

from server.artifacts.delta_pool import DeltaPool
from server.artifacts.pool import ArtifactInUse, Users
from server.artifacts.registry import DeltaRegistry, KindError, NameNotFound, Registry
from server.artifacts.store import Incoming, Store
from server.artifacts.versions import DeltaVersion, PolicyVersion, ProfileVersion, Ref, V
from server.core import GatewayError
from server.engine.base import EngineDelta
from server.metrics.residency import Census
from server.telemetry import Telemetry
from server.wire import UploadFields

# A received file -> what is durable about it, or the error that says what is wrong with it. Blocking.
Check = Callable[[Incoming], V]


class DigestMismatch(GatewayError):
    """The bytes that arrived are not the ones that were announced."""


class ArtifactPinned(KindError):
    """A pinned artifact cannot leave the memory."""


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

    def incoming(self, max_bytes: int) -> AbstractContextManager[Incoming]:
        return self._store.incoming(max_bytes)

    async def upload(self, fields: UploadFields, incoming: Incoming) -> tuple[Ref[V], bool]:
        """Check the received file and put it under its name; True when the name has a new version.

        Raises DigestMismatch, InvalidName, GenerationMismatch, InsufficientStorage and what the check raises
        (DeltaError, SteeringError); nothing stays then.
        """
        self._registry.check_name(fields.name)
        self._registry.check_generation(fields.name, fields.expected_generation)
        if incoming.digest != fields.sha256:
            raise DigestMismatch(f"received {incoming.nbytes} bytes with sha256 {incoming.digest}", param="sha256")
        async with self._checking:
            version = await asyncio.to_thread(self._check, incoming)
        ref, created = await self._registry.publish(
            fields.name, version, incoming, fields.activate, fields.expected_generation
        )
        self.count_upload("created" if created else "identical")
        return ref, created

    def count_upload(self, outcome: str, reason: str = "none") -> None:
        self._telemetry.uploads[self.kind].ended(outcome, reason)

    def count_received(self, nbytes: int, seconds: float) -> None:
        self._telemetry.uploads[self.kind].received(nbytes, seconds)

    def refs(self) -> list[Ref[V]]:
        return self._registry.refs()

    def get(self, name: str) -> Ref[V]:
        """Raises NameNotFound."""
        return self._registry.get(name)

    async def move(self, name: str, digest: str, expected_generation: int) -> Ref[V]:
        """Raises NameNotFound, GenerationMismatch, ArtifactBusy."""
        return await self._registry.move(name, digest, expected_generation)

    async def delete(self, name: str, drain: bool) -> None:
        """Forget a name, and the bytes that only it used. Raises NameNotFound, ArtifactBusy, ArtifactInUse."""
        async with self._registry.retiring(name) as ref:
            digests = self._registry.only_used_by(ref)
            await self._users.release(self.kind, digests, self._drain_timeout_s if drain else 0)

    def card(self, ref: Ref[V]) -> dict[str, Any]:
        """A name and its versions as the admin plane shows them."""
        versions = [
            {**version.model_dump(mode="json"), **self._users.usage(version.digest)} for version in ref.versions
        ]
        return {
            "object": self.kind,
            "name": ref.name,
            "digest": ref.digest,
            "generation": ref.generation,
            "versions": versions,
        }


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
        going = set(self._registry.only_used_by(self.get(name)))
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

    async def upload(self, fields: UploadFields, incoming: Incoming) -> tuple[Ref[DeltaVersion], bool]:
        ref, created = await super().upload(fields, incoming)
        self._pool.forgive(incoming.digest)
        self._keep_pinned(ref)
        return ref, created

    async def move(self, name: str, digest: str, expected_generation: int) -> Ref[DeltaVersion]:
        ref = await super().move(name, digest, expected_generation)
        self._keep_pinned(ref)
        return ref

    async def load(self, name: str) -> Ref[DeltaVersion]:
        """Make the active version resident. Raises NameNotFound, NoCapacity, DeltaTooLarge, EngineLoadError."""
        ref = self.get(name)
        await self._pool.load(self._active(ref))
        return ref

    async def unload(self, name: str) -> Ref[DeltaVersion]:
        """Take every version out of memory, packed or not. Raises NameNotFound, ArtifactPinned, ArtifactInUse."""
        ref = self.get(name)
        if any(self._pool.pinned(version.digest) for version in ref.versions):
            raise ArtifactPinned(self.kind, "the delta is pinned; unpin it first", param="name")
        await self._pool.drop([version.digest for version in ref.versions], wait_s=0)
        return ref

    async def pin(self, name: str) -> Ref[DeltaVersion]:
        """Load what the name points to, now and later, and keep it. Raises PinLimit, and as `load`."""
        delta = self._active(self.get(name))
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
