"""Tool-gate policies in memory, and which of them holds for a request."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.artifacts.names import Registry
from server.artifacts.versions import PolicyVersion
from steering.gate.policy import Policy, read_policy


@dataclass(frozen=True)
class Found:
    """A policy that a name points to."""

    name: str
    version: PolicyVersion


class Policies:
    """Reads a policy's file once, when a request first needs it.

    Deletion waits for no request: one that has read its policy keeps it, one that has not goes on without.
    """

    def __init__(self, registry: Registry[PolicyVersion], base_fingerprint: str, template_sha256: str) -> None:
        self._registry = registry
        self._base_fingerprint = base_fingerprint
        self._template_sha256 = template_sha256
        self._read: dict[str, Policy] = {}

    def named(self, name: str, param: str) -> Found:
        """Raises NameNotFound."""
        return Found(name, self._registry.active(name, param))

    def bound_to(self, delta_digest: str | None) -> Found | None:
        """The active policy of what serves the request; of several the first by name.

        Where none holds, one that is for the same delta but another base or template: the gate says so and stays out.
        """
        active = [Found(ref.name, version) for ref in self._registry.refs() if (version := ref.active()) is not None]
        fitting = [found for found in active if found.version.delta_digest == delta_digest]
        holding = [found for found in fitting if self._holds(found.version)]
        return next(iter(holding or fitting), None)

    def _holds(self, version: PolicyVersion) -> bool:
        return (version.base_fingerprint, version.template_sha256) == (self._base_fingerprint, self._template_sha256)

    async def read(self, digest: str) -> Policy:
        """Raises PolicyError where the stored file is no longer what it was."""
        if digest not in self._read:
            self._read[digest] = await asyncio.to_thread(read_policy, Path(self._registry.path(digest)))
        return self._read[digest]

    async def release(self, kind: str, digests: Sequence[str], wait_s: float) -> None:
        for digest in digests:
            self._read.pop(digest, None)

    def usage(self, digest: str) -> dict[str, Any]:
        return {}
