"""API keys -> Caller. Two scopes: inference and admin; an admin key may also infer, never the other way round."""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request

from server.core import GatewayError
from server.telemetry import Exchange


class MissingKey(GatewayError):
    """No Authorization header."""


class InvalidKey(GatewayError):
    """A key that we do not know."""


class AdminDisabled(GatewayError):
    """No admin key is configured, so the admin plane is closed."""


class InsufficientScope(GatewayError):
    """A good key, but not for the admin plane."""


@dataclass(frozen=True)
class Caller:
    """`key_id` is a short hash for the log, None where no key is needed."""

    key_id: str | None
    admin: bool


class Keyring:
    """The configured keys as hashes."""

    def __init__(self, api_keys: Sequence[str], admin_keys: Sequence[str]) -> None:
        self._api = [_digest(key) for key in api_keys]
        self._admin = [_digest(key) for key in admin_keys]

    def require_inference(self, request: Request) -> None:
        """Raises MissingKey, InvalidKey. Without configured API keys everybody may infer."""
        if self._api:
            self._admit(request)

    def require_admin(self, request: Request) -> None:
        """Raises AdminDisabled, MissingKey, InvalidKey, InsufficientScope."""
        if not self._admin:
            raise AdminDisabled("no admin key is configured: set auth.admin_keys or --admin-key-file")
        if not self._admit(request).admin:
            raise InsufficientScope("this key has no access to the admin plane")

    def _admit(self, request: Request) -> Caller:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise MissingKey("give an API key: Authorization: Bearer KEY")
        digest = _digest(key.strip())
        # Every key is compared, whatever matched before: the time taken says nothing about the keys.
        admin = sum(hmac.compare_digest(digest, known) for known in self._admin) > 0
        api = sum(hmac.compare_digest(digest, known) for known in self._api) > 0
        if not (admin or api):
            raise InvalidKey("the API key is not known")
        caller = Caller(digest.hex()[:8], admin)
        Exchange.of(request.scope).key_id = caller.key_id
        return caller


async def require_inference(request: Request) -> None:
    """The guard of the inference routes, as a FastAPI dependency."""
    keyring: Keyring = request.app.state.keyring
    keyring.require_inference(request)


async def require_admin(request: Request) -> None:
    """The guard of the admin routes, as a FastAPI dependency."""
    keyring: Keyring = request.app.state.keyring
    keyring.require_admin(request)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
