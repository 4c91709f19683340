"""What the handlers work with; built by `create_app`, one per application."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from server.admission import Admission
from server.artifacts.lifecycle import DeltaLifecycle
from server.artifacts.pool import Pool
from server.artifacts.registry import Registry
from server.gateway import Gateway
from server.telemetry import Telemetry


@dataclass(frozen=True)
class Limits:
    """Bytes of a request body and of an upload; tokens where a request names no limit."""

    max_body_bytes: int
    max_upload_bytes: int
    default_max_tokens: int


@dataclass(frozen=True)
class Context:
    gateway: Gateway
    registry: Registry
    admission: Admission
    pool: Pool
    deltas: DeltaLifecycle
    telemetry: Telemetry
    limits: Limits


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Ctx = Annotated[Context, Depends(_context)]
