"""API keys at the HTTP edge: who asks, and may they. What a key is and may do is in keys.py."""

from functools import partial

from fastapi import Request

from server.admission import Admission
from server.core import GatewayError
from server.keys import Caller, Keys, Scope
from server.telemetry import Exchange


class MissingKey(GatewayError):
    """No Authorization header."""


class InvalidKey(GatewayError):
    """A key that we do not know."""


class AdminDisabled(GatewayError):
    """No admin key is configured, so the admin plane is closed."""


class InsufficientScope(GatewayError):
    """A good key, but not for this."""


async def require_inference(request: Request) -> None:
    """The guard of the inference routes, as a FastAPI dependency. Raises MissingKey, InvalidKey, InsufficientScope."""
    keys: Keys = request.app.state.keys
    if not keys.inference_open:
        caller = _admit(request, keys, "inference")
        admission: Admission = request.app.state.context.admission
        Exchange.of(request.scope).allowances = partial(admission.allowances, caller)


async def require_admin(request: Request) -> None:
    """The guard of the admin routes. Raises AdminDisabled, MissingKey, InvalidKey, InsufficientScope."""
    keys: Keys = request.app.state.keys
    if not keys.any_admin:
        raise AdminDisabled("no admin key is configured: set auth.admin_keys, --admin-key-file or --key-file")
    _admit(request, keys, "admin")


def _admit(request: Request, keys: Keys, scope: Scope) -> Caller:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise MissingKey("give an API key: Authorization: Bearer KEY")
    caller = keys.find(key.strip())
    if caller is None:
        raise InvalidKey("the API key is not known")
    exchange = Exchange.of(request.scope)
    exchange.caller = caller
    if scope not in caller.scopes:
        raise InsufficientScope(f"this key has no {scope} scope")
    return caller
