"""A server that has just been started: how long it is waited for, and what is said meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable

from steering.errors import EndpointError

_POLL_S = 1.0
_TELL_S = 10.0


class Start:
    """Of one server. Its requests share the `limit_s`, which run from the first that does not find it up; 0 waits for nothing."""

    def __init__(self, limit_s: float, tell: Callable[[str], object]) -> None:
        self._limit_s = limit_s
        self._tell = tell
        self._over = limit_s <= 0
        self._since: float | None = None
        self._tell_at = 0.0

    def answered(self) -> None:
        """From now on the server is one that has started."""
        self._over = True

    def wait_s(self, problem: str, told_s: float) -> float | None:
        """Until the next try, at least what the server told; None where it has started. Raises EndpointError at the limit."""
        if self._over:
            return None
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        left_s = self._since + self._limit_s - now
        if left_s <= 0:
            raise EndpointError(f"the server has not started within {self._limit_s:g} s: {problem}")
        if now >= self._tell_at:
            self._tell(f"waiting for the server to start, {left_s:.0f} s left: {problem}")
            self._tell_at = now + _TELL_S
        return min(max(_POLL_S, told_s), left_s)
