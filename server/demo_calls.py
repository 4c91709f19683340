"""What the parts of `deltaworks demo` share."""

from __future__ import annotations

import hashlib
from pathlib import Path

import httpx


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


def upload(client: httpx.Client, kind: str, name: str, path: Path, headers: dict[str, str] | None = None) -> int:
    """Upload an artifact to `/v1/admin/KIND`; returns its bytes. Raises DemoError."""
    data = path.read_bytes()
    form = {"name": name, "sha256": hashlib.sha256(data).hexdigest()}
    expect(client.post(f"/v1/admin/{kind}", headers=headers, data=form, files={"file": (path.name, data)}), (200, 201))
    return len(data)


def expect(reply: httpx.Response, statuses: tuple[int, ...]) -> None:
    """Raises DemoError, with what the server said, for any other status."""
    if reply.status_code not in statuses:
        raise DemoError(
            f"{reply.request.method} {reply.request.url.path} answered {reply.status_code}: {reply.text[:500]}"
        )
