"""What the engine says of its steps."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server.engine.base import EngineStep

BATCH_EDGES = (1, 2, 4, 8, 16, 32, 64)
DISTINCT_EDGES = (1, 2, 3, 4, 6, 8, 16)


class EngineMetrics:
    """`last` is the newest step."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"deltaworks_{name}", text, registry=registry)

        self.last = EngineStep()
        self._rows = Gauge(
            "deltaworks_engine_rows",
            "Rows in the engine: in its batch, or waiting for it.",
            ["state"],
            registry=registry,
        )
        self._kv_usage = Gauge(
            "deltaworks_kv_cache_usage_ratio", "Part of the KV cache that is in use.", registry=registry
        )
        self._lookups = counter("prefix_cache_lookups", "Tokens of prompts that were looked up in the prefix cache.")
        self._hits = counter("prefix_cache_hits", "Tokens of prompts that the prefix cache held.")
        self._preemptions = counter("engine_preemptions", "Rows that had to give their KV cache up and start again.")
        self._batch = Histogram(
            "deltaworks_batch_size", "Rows that got a token in one step.", buckets=BATCH_EDGES, registry=registry
        )
        self._distinct = Histogram(
            "deltaworks_batch_distinct_deltas",
            "Different deltas in one step's batch, the base counting as one.",
            buckets=DISTINCT_EDGES,
            registry=registry,
        )
        for state in ("running", "waiting"):
            self._rows.labels(state)

    def record(self, step: EngineStep) -> None:
        self.last = step
        self._rows.labels("running").set(step.running)
        self._rows.labels("waiting").set(step.waiting)
        self._kv_usage.set(step.kv_usage)
        self._lookups.inc(step.lookups)
        self._hits.inc(step.hits)
        self._preemptions.inc(step.preemptions)
        if step.batch:
            self._batch.observe(step.batch)
        if step.running:
            with_base = step.running > sum(step.running_deltas.values())
            self._distinct.observe(len(step.running_deltas) + with_base)
