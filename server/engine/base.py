"""The engine as the gateway sees it. One real engine exists (vllm.py); the tests use a fake."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.core import Sampling, TokenEvent


class EngineError(Exception):
    """The engine failed on one request."""


class EngineDeadError(EngineError):
    """The engine's process is gone; nothing will be answered until the server restarts."""


class EngineLoadError(EngineError):
    """A delta could not be made resident."""


@dataclass(frozen=True)
class EngineDelta:
    """A delta as the engine knows it: the digest is the only identity, the path a local file of the artifact."""

    digest: str
    path: str


class Engine(Protocol):
    async def start(self) -> None:
        """Load the base model; returns when the first request can be answered. Raises EngineError."""
        ...

    async def stop(self) -> None:
        """End every process of the engine; safe to call when start failed or never ran."""
        ...

    @property
    def max_model_len(self) -> int:
        """Prompt and completion tokens together; known after start."""
        ...

    @property
    def dead(self) -> bool: ...

    def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        delta: EngineDelta | None,
        cache_salt: str | None,
    ) -> AsyncGenerator[TokenEvent, None]:
        """Stream the `sampling.n` choices of one prompt; closing the iterator aborts the rows."""
        ...

    async def load(self, delta: EngineDelta) -> int:
        """Make a delta resident and return its resident bytes. Raises EngineLoadError."""
        ...

    async def unload(self, delta: EngineDelta) -> None: ...
