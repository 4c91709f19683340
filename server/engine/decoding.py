"""Text of a fine-tune that has a tokenizer of its own: vLLM would decode every answer with the base's."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from server.engine.base import EngineDelta


class DeltaDecoding:
    """Which of transformers' tokenizers decodes the answers of a delta."""

    def __init__(self, own_tokenizer: Callable[[EngineDelta], Any]) -> None:
        """`own_tokenizer` is blocking, gives None for the base's, and may raise EngineLoadError."""
        self._own_tokenizer = own_tokenizer
        self._used: dict[str, list[Any]] = {}  # by the delta's digest, once a running request

    @asynccontextmanager
    async def used(self, delta: EngineDelta | None) -> AsyncIterator[None]:
        """Inside the block requests to the delta are decoded with its own tokenizer. Raises EngineLoadError."""
        tokenizer = None
        if delta is not None and delta.tokenizer:
            tokenizer = await asyncio.to_thread(self._own_tokenizer, delta)
        if delta is None or tokenizer is None:
            yield
            return
        used = self._used.setdefault(delta.digest, [])
        used.append(tokenizer)
        try:
            yield
        finally:
            used.pop()
            if not used:
                del self._used[delta.digest]

    def install(self, processor: Any) -> None:
        """Into vLLM's `OutputProcessor`, which makes a request's decoder when it is added, with the tokenizer that it has then."""
        inner = processor.add_request

        @functools.wraps(inner)
        def add_request(request: Any, *args: Any, **kwargs: Any) -> None:
            lora = request.lora_request
            used = self._used.get(lora.lora_name) if lora is not None else None
            if not used:
                inner(request, *args, **kwargs)
                return
            base, processor.tokenizer = processor.tokenizer, used[-1]
            try:
                inner(request, *args, **kwargs)
            finally:
                processor.tokenizer = base

        processor.add_request = add_request
