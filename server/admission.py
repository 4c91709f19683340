"""Admission: permits for rows in flight, and a budget of prompt tokens that wait for their first output token.

Both are limited for the server (503 where it is full) and, where a key says so, for the key (429). What is over a limit is
refused at once, with the time after which, at the pace of the last minute, there will be room; what is admitted waits its
turn (turns.py).
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from server.core import GatewayError, InvalidRequest
from server.keys import ANYBODY, Caller

_WINDOW_S = 60.0
_LONGEST_S = 60.0


class ServerOverloaded(GatewayError):
    """Too many requests in flight, or too many prompt tokens waiting."""


class CallerOverloaded(GatewayError):
    """One key has too many requests in flight."""


class RateLimited(GatewayError):
    """One key sends too much: requests a minute, or prompt tokens at a time."""


class Pace:
    """How much of something happened in the last minute, to say when more will have."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._done: deque[tuple[float, int]] = deque(maxlen=1000)

    def add(self, amount: int) -> None:
        if amount:
            self._done.append((self._clock(), amount))

    def wait_s(self, amount: int) -> float:
        """Until `amount` more is done; a second where nothing is known."""
        now = self._clock()
        while self._done and self._done[0][0] < now - _WINDOW_S:
            self._done.popleft()
        done = sum(amount for _, amount in self._done)
        if len(self._done) < 2:
            return 1.0
        per_s = done / max(now - self._done[0][0], 0.001)
        return min(max(amount / per_s, 0.05), _LONGEST_S)


class Load:
    """What is in flight: rows, prompt tokens that wait, and how fast both go."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.rows = 0
        self.queued_tokens = 0
        self.rows_done = Pace(clock)
        self.tokens_done = Pace(clock)
        self.refill = 0.0  # when the requests of this minute will be forgotten (GCRA)


@dataclass(frozen=True)
class Allowance:
    """What a key has left of a limit on `what`, and in how many seconds all of it will be there again if it asks for no more."""

    what: Literal["requests", "tokens"]
    limit: int
    remaining: int
    reset_s: float


class Permit:
    """The right of one request to run `rows` rows; travels with the call and frees itself with the block."""

    def __init__(self, admission: "Admission", caller: Caller, loads: Sequence[Load], rows: int) -> None:
        self._admission = admission
        self._caller = caller
        self._loads = loads
        self.rows = rows
        self.queued_tokens = 0

    def queue(self, tokens: int) -> None:
        """Count `tokens` prompt tokens as waiting until `started()`. Raises ServerOverloaded, RateLimited, InvalidRequest."""
        self._admission.check_queue(self._caller, self._loads, tokens)
        self._count(tokens)
        self.queued_tokens = tokens

    def started(self) -> None:
        if self.queued_tokens:
            self._count(-self.queued_tokens)
            for load in self._loads:
                load.tokens_done.add(self.queued_tokens)
            self.queued_tokens = 0

    def _count(self, tokens: int) -> None:
        for load in self._loads:
            load.queued_tokens += tokens


class Admission:
    def __init__(
        self, max_concurrent: int, max_queued_tokens: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_concurrent = max_concurrent
        self._max_queued_tokens = max_queued_tokens
        self._clock = clock
        self.server = Load(clock)
        self._callers: dict[str, Load] = {}  # of keys, which are configured, so there are not many

    @property
    def rows(self) -> int:
        return self.server.rows

    @property
    def queued_tokens(self) -> int:
        return self.server.queued_tokens

    @contextmanager
    def permit(self, rows: int, caller: Caller = ANYBODY) -> Iterator[Permit]:
        """Raises CallerOverloaded, RateLimited, ServerOverloaded, and InvalidRequest for what the key could never run.

        For the server a request alone is let in whatever its size, or it could never run.
        """
        loads = [self.server]
        if caller.key_id is not None:
            loads.append(self._callers.setdefault(caller.key_id, Load(self._clock)))
            self._check_caller(caller, loads[-1], rows)
        over = self.server.rows + rows - self._max_concurrent
        if self.server.rows and over > 0:
            message = f"the gateway already runs {self.server.rows} rows"
            raise ServerOverloaded(message, retry_after_s=self.server.rows_done.wait_s(over))
        if caller.limits.requests_per_minute is not None:
            last = loads[-1]
            last.refill = max(last.refill, self._clock()) + _WINDOW_S / caller.limits.requests_per_minute
        permit = Permit(self, caller, loads, rows)
        for load in loads:
            load.rows += rows
        try:
            yield permit
        finally:
            permit.started()
            for load in loads:
                load.rows -= rows
                load.rows_done.add(rows)

    def allowances(self, caller: Caller) -> list[Allowance]:
        """Of requests a minute and of prompt tokens that may wait, where the key is limited so."""
        own = self._callers.get(caller.key_id or "") or Load(self._clock)
        found, a_minute, tokens = [], caller.limits.requests_per_minute, caller.limits.max_queued_tokens
        if a_minute is not None:
            full_in_s = max(own.refill - self._clock(), 0.0)
            spent = math.ceil((full_in_s - 0.001) * a_minute / _WINDOW_S)
            found.append(Allowance("requests", a_minute, max(a_minute - spent, 0), full_in_s))
        if tokens is not None:
            reset_s = own.tokens_done.wait_s(own.queued_tokens) if own.queued_tokens else 0.0
            found.append(Allowance("tokens", tokens, tokens - own.queued_tokens, reset_s))
        return found

    def _check_caller(self, caller: Caller, own: Load, rows: int) -> None:
        limits = caller.limits
        if limits.max_concurrent is not None:
            if rows > limits.max_concurrent:
                raise InvalidRequest(f"the request has {rows} rows, and this key may run {limits.max_concurrent}")
            over = own.rows + rows - limits.max_concurrent
            if over > 0:
                message = f"this key already runs {own.rows} rows, and may run {limits.max_concurrent}"
                raise CallerOverloaded(message, retry_after_s=own.rows_done.wait_s(over))
        if limits.requests_per_minute is not None:
            left_s = own.refill - self._clock() + _WINDOW_S / limits.requests_per_minute - _WINDOW_S
            if left_s > 0.001:
                message = f"this key may send {limits.requests_per_minute} requests a minute"
                raise RateLimited(message, retry_after_s=left_s)

    def check_queue(self, caller: Caller, loads: Sequence[Load], tokens: int) -> None:
        """Raises ServerOverloaded, RateLimited, InvalidRequest."""
        server, *own = loads
        limit = caller.limits.max_queued_tokens
        if limit is not None and own:
            if tokens > limit:
                raise InvalidRequest(f"the prompt has {tokens} tokens, and this key may have {limit} waiting")
            over = own[0].queued_tokens + tokens - limit
            if over > 0:
                message = f"{own[0].queued_tokens} prompt tokens of this key are already waiting"
                raise RateLimited(message, retry_after_s=own[0].tokens_done.wait_s(over))
        over = server.queued_tokens + tokens - self._max_queued_tokens
        if server.queued_tokens and over > 0:
            message = f"{server.queued_tokens} prompt tokens are already waiting"
            raise ServerOverloaded(message, retry_after_s=server.tokens_done.wait_s(over))
