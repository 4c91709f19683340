"""Which delta a request is about, read where only its head and the beginning of its body are known."""

import asyncio
import json
import re
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from server.access import Message, Receive
from server.app import INFERENCE, ROUTES

_NAMED_IN_BODY = {path for access, method, path, _ in ROUTES if (access, method) == (INFERENCE, "POST")}
_NAMED_IN_PATH = re.compile(r"/v1/admin/deltas/(?P<name>[^/]+)(?:/.*)?")
_KEY = re.compile(r"[A-Za-z0-9+._-]{1,1024}")
_PEEK_BYTES = 4 << 20  # longer bodies go to any replica
_PEEK_S = 1.0  # and so do slow ones: the replica has the limits of time


async def find(scope: Mapping[str, Any], receive: Receive) -> tuple[str | None, Receive]:
    """The key of the request's delta, None where it has none; and a `receive` that says again what was read to find it."""
    path = scope["path"]
    if scope["method"] == "POST" and path in _NAMED_IN_BODY:
        body, receive = await _peek(receive)
        return in_body(body), receive
    named = _NAMED_IN_PATH.fullmatch(path)
    return (named["name"] if named and _KEY.fullmatch(named["name"]) else None), receive


def in_body(body: bytes) -> str | None:
    """`NAME` of what `model` may be (NAME, BASE:NAME, NAME@VERSION); of a combination, its names.

    Nothing but the choice of a replica hangs on it: a wrong body is answered by the one that gets it.
    """
    try:
        asked = json.loads(body)
        parts = asked.get("delta")
        names = sorted(part["name"] for part in parts) if parts else [asked["model"]]
        key = "+".join(name.rpartition(":")[2].partition("@")[0] for name in names)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None
    return key if _KEY.fullmatch(key) else None


async def _peek(receive: Receive) -> tuple[bytes, Receive]:
    read: deque[Message] = deque()
    nbytes, late = 0, None
    ends = time.monotonic() + _PEEK_S
    while nbytes <= _PEEK_BYTES:
        coming = asyncio.ensure_future(receive())
        if not (await asyncio.wait({coming}, timeout=ends - time.monotonic()))[0]:
            late = coming  # not cancelled: what it has read would be lost
            break
        message = coming.result()
        read.append(message)
        nbytes += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    body = b"".join(message.get("body", b"") for message in read)

    async def again() -> Message:
        nonlocal late
        if read:
            return read.popleft()
        waiting, late = late, None
        return await (waiting or receive())

    return body, again
