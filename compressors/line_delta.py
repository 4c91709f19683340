"""A text as its difference to another: runs of the other's lines, and lines of its own, deflated. No torch.

    deflate(JSON [[start, count] | "line\\nline" ...])

Made for tokenizers, whose tens of thousands of lines are the base's but for a few. Nothing of an unknown text is trusted: what
comes out is bounded before it is made.
"""

from __future__ import annotations

import json
import zlib
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence

from compressors.errors import ArtifactError

MAX_TEXT_BYTES = 64 << 20


def encode(text: str, against: str = "") -> bytes:
    """The difference of `text` to `against`; without the latter, all of it."""
    operations = list(_operations(text.split("\n"), against.split("\n") if against else []))
    return zlib.compress(json.dumps(operations, separators=(",", ":")).encode(), 9)


def decode(data: bytes, against: str = "") -> str:
    """The text that was encoded. Raises ArtifactError for anything else, and for a text over `MAX_TEXT_BYTES`."""
    base = against.split("\n") if against else []
    try:
        inflater = zlib.decompressobj()
        inflated = inflater.decompress(data, MAX_TEXT_BYTES)
        if not inflater.eof or inflater.unused_data:
            raise ArtifactError(f"a text is cut off, or has more than {MAX_TEXT_BYTES} bytes")
        operations = json.loads(inflated)
        return "\n".join(_lines(operations, base))
    except (zlib.error, ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"a text cannot be read: {error}") from error


def _operations(lines: Sequence[str], base: Sequence[str]) -> Iterator[list[int] | str]:
    """Greedy: go on in the base's lines as long as they agree, else at the next place that has the line."""
    places: dict[str, list[int]] = defaultdict(list)
    for number, line in enumerate(base):
        places[line].append(number)
    own: list[str] = []
    at = i = 0
    while i < len(lines):
        start = _next_place(places.get(lines[i]), at)
        if start is None:
            own.append(lines[i])
            i += 1
            continue
        if own:
            yield "\n".join(own)
            own = []
        count = 1
        while i + count < len(lines) and start + count < len(base) and lines[i + count] == base[start + count]:
            count += 1
        yield [start, count]
        at, i = start + count, i + count
    if own:
        yield "\n".join(own)


def _next_place(places: Sequence[int] | None, at: int) -> int | None:
    if not places:
        return None
    after = bisect_left(places, at)
    return places[after] if after < len(places) else places[0]


def _lines(operations: object, base: Sequence[str]) -> Iterator[str]:
    if not isinstance(operations, list):
        raise ArtifactError("a text is no list of operations")
    room = MAX_TEXT_BYTES
    for operation in operations:
        lines: Sequence[str]
        if isinstance(operation, str):
            lines = [operation]
        else:
            start, count = operation
            if not (type(start) is int and type(count) is int and 0 <= start < start + count <= len(base)):
                raise ArtifactError("a text names lines that the base's has not got")
            lines = base[start : start + count]
        room -= sum(map(len, lines)) + len(lines)
        if room < 0:
            raise ArtifactError(f"a text has more than {MAX_TEXT_BYTES} bytes")
        yield from lines
