"""Whose turn it is: the order in which admitted requests go to the engine.

The engine serves first come, first served, so it is given what it can run and a little more; the others wait here, in one
queue per delta. Start-time fair queueing (Goyal, Vin and Cheng, 1996) over the tokens that were really served, as VTC (Sheng et
al., 2024) counts them: every delta has a tag that grows with its tokens, the least tag is next, and a delta that comes back
starts at the tag that was served last. So the first request of a delta that had its share or less waits for one place, and for
no request of a delta that had more, however many of those wait.

An engine's batch holds rows of so many deltas and no more. Where the next request is of yet another one, the running delta that was
served most gets no further row until it has left the batch, while the others go on.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Gauge, Histogram

WAIT_EDGES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class TurnMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.waiting = Gauge(
            "deltaworks_rows_waiting", "Rows that were admitted and wait for the engine's turn.", registry=registry
        )
        self.wait = Histogram(
            "deltaworks_queue_duration_seconds",
            "Time that a request waited for its turn.",
            buckets=WAIT_EDGES,
            registry=registry,
        )


@dataclass(eq=False)
class _Ticket:
    rows: int
    tokens: int
    number: int
    called: asyncio.Future[None]


@dataclass(eq=False)
class Flow:
    """The requests of one delta, or of the base (`key` None). `rows` are with the engine."""

    key: str | None
    tag: float
    rows: int = 0
    leaving: bool = False
    waiting: deque[_Ticket] = field(default_factory=deque)

    def served(self, tokens: int) -> None:
        self.tag += tokens


class Turns:
    """At most `max_rows` rows and `max_deltas` different deltas at a time; a request alone goes whatever its size."""

    def __init__(self, max_rows: int, max_deltas: int, metrics: TurnMetrics) -> None:
        self.max_rows = max_rows
        self.rows = 0
        self._max_deltas = max_deltas
        self._wait = metrics.wait
        self._flows: dict[str | None, Flow] = {}
        self._served_last = 0.0  # the tag of the flow whose turn came last
        self._tickets = 0
        metrics.waiting.set_function(lambda: self.waiting)

    @property
    def waiting(self) -> int:
        return sum(ticket.rows for flow in self._flows.values() for ticket in flow.waiting)

    @asynccontextmanager
    async def turn(self, key: str | None, rows: int, tokens: int) -> AsyncIterator[Flow]:
        """Inside the block the rows are with the engine; `tokens` are its prompts', what it generates is to be told."""
        loop = asyncio.get_running_loop()
        asked = loop.time()
        flow = self._flows.setdefault(key, Flow(key, self._served_last))
        if not flow.waiting:
            flow.tag = max(flow.tag, self._served_last)
        self._tickets += 1
        ticket = _Ticket(rows, tokens, self._tickets, loop.create_future())
        flow.waiting.append(ticket)
        self._call()
        try:
            await ticket.called
            self._wait.observe(loop.time() - asked)
            yield flow
        finally:
            if ticket in flow.waiting:
                flow.waiting.remove(ticket)
            else:
                self.rows -= rows
                flow.rows -= rows
            self._call()

    def _call(self) -> None:
        """Call every request whose turn it is."""
        while (flow := self._next()) is not None:
            ticket = flow.waiting.popleft()
            self.rows += ticket.rows
            flow.rows += ticket.rows
            self._served_last = max(self._served_last, flow.tag)
            flow.served(ticket.tokens)
            if not ticket.called.done():  # a request that is being cancelled gives its place back
                ticket.called.set_result(None)
        contended = self.waiting > 0
        for key, flow in list(self._flows.items()):
            if not (flow.rows or flow.waiting or (contended and flow.tag > self._served_last)):
                del self._flows[key]

    def _next(self) -> Flow | None:
        """The flow whose first request goes now; None where the next one has to wait."""
        waiting = [flow for flow in self._flows.values() if flow.waiting]
        if not waiting:
            return None
        inside = [flow for flow in self._flows.values() if flow.rows and flow.key is not None]
        for flow in sorted(waiting, key=lambda flow: (flow.tag, flow.waiting[0].number)):
            if flow.key is not None and not flow.rows:
                flow.leaving = False
                if len(inside) >= self._max_deltas:
                    if not any(other.leaving for other in inside):
                        max(inside, key=lambda other: other.tag).leaving = True
                    continue
            if flow.leaving:
                continue
            fits = not self.rows or self.rows + flow.waiting[0].rows <= self.max_rows
            return flow if fits else None
        return None
