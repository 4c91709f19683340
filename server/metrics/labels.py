"""Names of deltas as label values: only registered ones, and never more than a limit."""

import time
from typing import Any

IDLE_S = 3600.0


class DeltaLabels:
    """At most `limit` names have series of their own, all others share `other`.

    First come, first served; a name that no request used for `IDLE_S` gives its place to the next one.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used: dict[str, float] = {}  # least recently used first
        self._metrics: list[Any] = []

    def bind(self, *metrics: Any) -> None:
        """These have a label `delta`; their series go when a name does."""
        self._metrics += metrics

    def of(self, delta: str | None) -> str:
        """`delta` must be a registered name or one of the words that no delta may have; None is a request that resolved none."""
        if delta is None:
            return "none"
        if delta not in self._used and len(self._used) >= self._limit and not self._drop_idle():
            return "other"
        self._used.pop(delta, None)
        self._used[delta] = time.monotonic()
        return delta

    def names(self) -> list[str]:
        return list(self._used)

    def known(self, delta: str) -> bool:
        """Whether the name has series of its own now."""
        return delta in self._used

    def forget(self, delta: str) -> None:
        """Drop the series of a deleted delta, so that they do not go on being scraped."""
        self._used.pop(delta, None)
        for metric in self._metrics:
            metric.remove_by_labels({"delta": delta})

    def _drop_idle(self) -> bool:
        oldest = next(iter(self._used))
        if time.monotonic() - self._used[oldest] < IDLE_S:
            return False
        self.forget(oldest)
        return True
