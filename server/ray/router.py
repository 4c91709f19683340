"""Which replica a request goes to: its delta's home while that has room, then the next one.

Ray Serve's consistent hash over replicas, rather than its model multiplexing: the home of a delta is the same in every proxy
from the first request on, where multiplexed ids are reported after a load, so that a burst spreads a delta over all replicas;
and what is resident stays a matter of the pool alone (server/artifacts/delta_pool.py), without a second LRU beside it.
"""

import random
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

_FALLBACKS = 15  # replicas that are tried after the home, in the order of the ring
_CHOICES = 2  # the power of two choices


class DeltaRouter(ConsistentHashRouter):  # type: ignore[misc]  # Ray has no types here
    """`base`: the id of what has no home. It goes, like all requests without a key, to the less busy of two replicas."""

    # Ray's tenth of a second sends a busy home's requests elsewhere. A dead one is known at once.
    queue_len_response_deadline_s = max_queue_len_response_deadline_s = 5.0

    def initialize_state(self, base: str) -> None:
        super().initialize_state(num_fallback_replicas=_FALLBACKS)
        self._base = base

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        if pending_request is not None and pending_request.metadata.session_id not in ("", None, self._base):
            ranked: list[list[Any]] = await super().choose_replicas(candidate_replicas, pending_request)
            return ranked
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        return [random.sample(candidate_replicas, min(_CHOICES, len(candidate_replicas)))]
