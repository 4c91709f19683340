"""Several deltas of one request as one: the weighted sum of them, under an identity of its own."""

import hashlib
from collections.abc import Sequence

from server.core import InvalidRequest
from server.engine.base import EngineDelta, WeightedDelta


def combination(parts: Sequence[WeightedDelta], chat: bool) -> EngineDelta:
    """The sum of `parts`, the same whatever their order: its digest is that of the sorted digests and weights.

    Chat template: that of the parts that have one of their own, which must be the same. End tokens: those of all parts, the base's
    too where a part has none of its own. Raises InvalidRequest where tokenizers differ, or templates and a chat is to be rendered.
    """
    parts = sorted(parts, key=lambda part: part.delta.digest)
    if len({(part.delta.tokenizer, part.delta.added_tokens) for part in parts}) > 1:
        message = "the deltas have different tokenizers, so they cannot be combined"
        raise InvalidRequest(message, param="delta")
    templates = {part.delta.chat_template for part in parts if part.delta.chat_template}
    if chat and len(templates) > 1:
        message = "the deltas have different chat templates; render the chat yourself and use /v1/completions"
        raise InvalidRequest(message, param="delta")
    stop_ids = sorted({token for part in parts for token in part.delta.stop_ids})
    return EngineDelta(
        digest=digest(parts),
        path="",
        chat_template=next(iter(templates), "") if len(templates) == 1 else "",
        stop_ids=tuple(stop_ids),
        base_stops=not all(part.delta.stop_ids for part in parts),
        added_tokens=parts[0].delta.added_tokens,
        tokenizer=parts[0].delta.tokenizer,
        parts=tuple(parts),
    )


def digest(parts: Sequence[WeightedDelta]) -> str:
    """Of sorted parts. The first line keeps it apart from every digest of a file's bytes."""
    lines = [f"{part.delta.digest} {(part.weight + 0.0).hex()}" for part in parts]  # + 0.0: a zero has no sign
    return hashlib.sha256("\n".join(["deltaworks combination", *lines]).encode()).hexdigest()
