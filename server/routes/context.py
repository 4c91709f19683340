"""What the handlers work with; built by `create_app`, one per application."""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request

from server.admission import Admission
from server.artifacts.adapters import AdapterFolder
from server.artifacts.delta_pool import DeltaPool
from server.artifacts.lifecycle import DeltaLifecycle, Lifecycle
from server.artifacts.pool import EditPool
from server.artifacts.registry import DeltaRegistry
from server.artifacts.versions import PolicyVersion, ProfileVersion, SAEVersion
from server.gateway import Gateway
from server.prompt import PromptRenderer
from server.telemetry import Telemetry
from server.wire import Unread


@dataclass(frozen=True)
class Limits:
    """What the edge allows: bytes of a request body and of an upload, tokens where a request names no limit, how long a body
    and an answer may take, priorities, /tokenizer_info. A stream that says nothing for `keep_alive_s` sends a comment; 0 = none.
    """

    max_body_bytes: int
    max_upload_bytes: int
    default_max_tokens: int
    body_timeout_s: float
    request_timeout_s: float | None
    priorities: bool
    tokenizer_info: bool
    keep_alive_s: float


@dataclass(frozen=True)
class Context:
    gateway: Gateway
    registry: DeltaRegistry
    admission: Admission
    pool: DeltaPool
    edits: EditPool
    deltas: DeltaLifecycle
    profiles: Lifecycle[ProfileVersion]
    saes: Lifecycle[SAEVersion]
    policies: Lifecycle[PolicyVersion]
    adapters: AdapterFolder | None
    telemetry: Telemetry
    limits: Limits
    prompts: PromptRenderer
    unread: Unread


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Ctx = Annotated[Context, Depends(_context)]


async def _serving(context: Ctx) -> Context:
    context.gateway.require_ready()
    return context


# Of a server that takes requests; before the body is looked at.
Serving = Annotated[Context, Depends(_serving)]


async def _artifacts(request: Request, context: Ctx) -> Lifecycle[Any]:
    """The kind that the route is about: /v1/admin/KIND/..."""
    kinds: dict[str, Lifecycle[Any]] = {
        "deltas": context.deltas,
        "profiles": context.profiles,
        "saes": context.saes,
        "policies": context.policies,
    }
    return kinds[request.scope["route"].path.split("/")[3]]


Artifacts = Annotated[Lifecycle[Any], Depends(_artifacts)]
