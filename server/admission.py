"""Admission: permits for rows in flight, and a budget of prompt tokens that wait for their first output token.

A full gateway answers 503 at once instead of queueing: the engine has its own queue, a second one would only hide it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from server.core import GatewayError


class ServerOverloaded(GatewayError):
    """Too many requests in flight, or too many prompt tokens waiting."""


class Permit:
    """The right of one request to run `rows` rows; travels with the call and frees itself with the block."""

    def __init__(self, admission: "Admission", rows: int) -> None:
        self._admission = admission
        self.rows = rows
        self.queued_tokens = 0

    def queue(self, tokens: int) -> None:
        """Count `tokens` prompt tokens as waiting until `started()`. Raises ServerOverloaded."""
        self._admission.check_queue(tokens)
        self._admission.queued_tokens += tokens
        self.queued_tokens = tokens

    def started(self) -> None:
        self._admission.queued_tokens -= self.queued_tokens
        self.queued_tokens = 0


class Admission:
    def __init__(self, max_concurrent: int, max_queued_tokens: int) -> None:
        self._max_concurrent = max_concurrent
        self._max_queued_tokens = max_queued_tokens
        self.rows = 0
        self.queued_tokens = 0

    @contextmanager
    def permit(self, rows: int) -> Iterator[Permit]:
        """Raises ServerOverloaded. A request alone is let in whatever its size, or it could never run."""
        if self.rows and self.rows + rows > self._max_concurrent:
            raise ServerOverloaded(f"the gateway already runs {self.rows} rows", retry_after_s=1)
        permit = Permit(self, rows)
        self.rows += rows
        try:
            yield permit
        finally:
            permit.started()
            self.rows -= rows

    def check_queue(self, tokens: int) -> None:
        if self.queued_tokens and self.queued_tokens + tokens > self._max_queued_tokens:
            raise ServerOverloaded(f"{self.queued_tokens} prompt tokens are already waiting", retry_after_s=1)
