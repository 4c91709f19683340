"""The life of a delta on the server: uploaded, named, warmed, dropped, deleted. Joins store, registry and pool."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from compressors.verify import Report
from server.artifacts.pool import Pool
from server.artifacts.registry import DeltaNotFound, Ref, Registry, Version
from server.artifacts.store import Incoming, Store
from server.core import GatewayError
from server.schemas import UploadFields
from server.telemetry import Telemetry

Verify = Callable[[Path], Report]


class DigestMismatch(GatewayError):
    """The bytes that arrived are not the ones that were announced."""


class DeltaLifecycle:
    def __init__(
        self,
        store: Store,
        registry: Registry,
        pool: Pool,
        verify: Verify,
        telemetry: Telemetry,
        drain_timeout_s: float,
    ) -> None:
        self._store = store
        self._registry = registry
        self._pool = pool
        self._verify = verify
        self._telemetry = telemetry
        self._drain_timeout_s = drain_timeout_s
        self._verifying = asyncio.Lock()  # one at a time: verification maps a whole file

    def incoming(self, max_bytes: int) -> AbstractContextManager[Incoming]:
        return self._store.incoming(max_bytes)

    async def upload(self, fields: UploadFields, incoming: Incoming) -> tuple[Ref, bool]:
        """Check the received file and put it under its name; True when the name has a new version.

        Raises DigestMismatch, InvalidName, GenerationMismatch, DeltaError, InsufficientStorage; nothing stays then.
        """
        self._registry.check_name(fields.name)
        self._registry.check_generation(fields.name, fields.expected_generation)
        if incoming.digest != fields.sha256:
            raise DigestMismatch(f"received {incoming.nbytes} bytes with sha256 {incoming.digest}", param="sha256")
        async with self._verifying:
            report = await asyncio.to_thread(self._verify, incoming.path)
        ref, created = await self._registry.publish(
            fields.name, _version(report), incoming, fields.activate, fields.expected_generation
        )
        self._telemetry.uploads.labels("created" if created else "identical").inc()
        return ref, created

    async def move(self, name: str, digest: str, expected_generation: int) -> Ref:
        """Raises DeltaNotFound, GenerationMismatch, DeltaBusy."""
        return await self._registry.move(name, digest, expected_generation)

    async def load(self, name: str) -> Ref:
        """Make the active version resident. Raises DeltaNotFound, DeltaCapacity, EngineLoadError."""
        ref = self._registry.get(name)
        if ref.digest is None:
            raise DeltaNotFound("the delta has no active version; move its alias first", param="name")
        await self._pool.load(self._registry.engine_delta(ref.digest))
        return ref

    async def unload(self, name: str) -> Ref:
        """Take every version out of memory. Raises DeltaNotFound, DeltaInUse."""
        ref = self._registry.get(name)
        await self._pool.drop([version.digest for version in ref.versions], wait_s=0)
        return ref

    async def delete(self, name: str, drain: bool) -> None:
        """Forget a name, and the bytes that only it used. Raises DeltaNotFound, DeltaBusy, DeltaInUse."""
        async with self._registry.retiring(name) as ref:
            await self._pool.drop(self._registry.only_used_by(ref), self._drain_timeout_s if drain else 0)
        self._telemetry.forget_delta(name)

    def card(self, ref: Ref) -> dict[str, Any]:
        """A delta as the admin plane shows it."""
        return {
            "object": "delta",
            "name": ref.name,
            "digest": ref.digest,
            "generation": ref.generation,
            "versions": [self._version_card(version) for version in ref.versions],
        }

    def _version_card(self, version: Version) -> dict[str, Any]:
        state, resident_bytes = self._pool.state(version.digest)
        return {
            **version.model_dump(mode="json"),
            "state": state,
            "resident_bytes": resident_bytes,
            "in_flight": self._pool.leases(version.digest),
        }


def _version(report: Report) -> Version:
    manifest = report.manifest
    return Version(
        digest=report.digest,
        nbytes=report.nbytes,
        created=int(time.time()),
        method=manifest.method,
        base_fingerprint=manifest.base_fingerprint,
        ratio=manifest.ratio,
        checks=report.checks,
    )
