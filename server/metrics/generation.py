"""What is counted of generation: where requests are, how long their parts take, tokens, and how answers end."""

import time
from collections import Counter as Tally
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from server.core import TokenEvent
from server.decisions import Decisions, Pace, Phase, Swap
from server.metrics.labels import DeltaLabels

# As vLLM's, so that panels of both can be laid over each other.
TTFT_EDGES = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
TOKEN_EDGES = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LATENCY_EDGES = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 640)
QUEUE_EDGES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
LENGTH_EDGES = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)  # OpenTelemetry's for generative models
KINDS = ("base", "delta")
FINISH_REASONS = ("stop", "length", "tool_calls", "cancelled", "error", "deadline")


class GenerationMetrics:
    """Histograms are by kind, base or delta; only counters and gauges are by delta."""

    def __init__(self, registry: CollectorRegistry, labels: DeltaLabels) -> None:
        def histogram(name: str, text: str, edges: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"deltaworks_{name}", text, labels, buckets=edges, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"deltaworks_{name}", text, labels, registry=registry)

        self._labels = labels
        self._live: dict[int, Decisions] = {}
        self.ttft = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", TTFT_EDGES, "kind", "swap"
        )
        self.gaps = histogram("inter_token_latency_seconds", "Between two tokens of one choice.", TOKEN_EDGES, "kind")
        self._pace = histogram(
            "time_per_output_token_seconds", "A choice's mean time between tokens.", TOKEN_EDGES, "kind"
        )
        self._queue = histogram("engine_queue_duration_seconds", "A row's wait in the engine's queue.", QUEUE_EDGES)
        self._prefill = histogram(
            "prefill_duration_seconds",
            "From a row's first step in the engine to its first token.",
            LATENCY_EDGES,
            "kind",
        )
        self._decode = histogram(
            "decode_duration_seconds", "From a request's first token to its last.", LATENCY_EDGES, "kind"
        )
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.", "delta")
        self.generated_tokens = counter("generated_tokens", "Tokens of answers.", "delta")
        self._cached = counter("prompt_tokens_cached", "Tokens of prompts that the prefix cache held.")
        self._prompt_length = histogram("request_prompt_tokens", "Tokens of a request's prompts.", LENGTH_EDGES)
        self._answer_length = histogram("request_generated_tokens", "Tokens of a request's answers.", LENGTH_EDGES)
        self.finished = counter("finish_reasons", "Choices by how they ended.", "reason")
        labels.bind(self.prompt_tokens, self.generated_tokens)
        for kind in KINDS:
            for metric in (self.gaps, self._pace, self._prefill, self._decode):
                metric.labels(kind)
        self.ttft.labels("base", "hot")
        for swap in get_args(Swap):
            self.ttft.labels("delta", swap)
        for reason in FINISH_REASONS:
            self.finished.labels(reason)
        self.prompt_tokens.labels("base"), self.generated_tokens.labels("base")
        registry.register(_LiveCollector(self._live, labels))

    @contextmanager
    def tracking(self, decisions: Decisions) -> Iterator[None]:
        """The request counts as in flight inside the block."""
        self._live[id(decisions)] = decisions
        try:
            yield
        finally:
            del self._live[id(decisions)]

    def in_phase(self, *phases: Phase) -> int:
        return sum(decisions.phase in phases for decisions in self._live.values())

    def saw(self, event: TokenEvent, decisions: Decisions) -> None:
        """Take the times of an event as it goes out."""
        now = time.perf_counter()
        if decisions.ttft_s is None:
            decisions.ttft_s = now - decisions.started
            decisions.phase = "decode"
        if event.times is not None and decisions.row_times is None:
            decisions.row_times = event.times
            decisions.queue_s = (decisions.queue_s or 0.0) + event.times.scheduled - event.times.queued
        pace, tokens = decisions.pace.get(event.index), len(event.token_ids)
        if pace is None:
            pace = decisions.pace[event.index] = Pace(now, now)
        elif tokens:
            self.gaps.labels(decisions.kind).observe((now - pace.last) / tokens)
        pace.last, pace.tokens = now, pace.tokens + tokens
        if event.finish_reason is not None and pace.tokens > 1:
            self._pace.labels(decisions.kind).observe((pace.last - pace.first) / (pace.tokens - 1))

    def record(self, decisions: Decisions, broken: str | None) -> None:
        """A request that has ended; `broken` is why choices did not finish, where they did not."""
        if decisions.delta is None:
            return
        label, kind = self._labels.of(decisions.delta), decisions.kind
        for reason in decisions.finish_reasons:
            self.finished.labels(reason).inc()
        if broken is not None:
            self.finished.labels(broken).inc()
        if decisions.ttft_s is not None:
            self.ttft.labels(kind, decisions.swap or "hot").observe(decisions.ttft_s)
            self._decode.labels(kind).observe(decisions.decode_s or 0.0)
        if decisions.row_times is not None:
            self._queue.observe(decisions.row_times.scheduled - decisions.row_times.queued)
            self._prefill.labels(kind).observe(decisions.row_times.first_token - decisions.row_times.scheduled)
        if decisions.prompt_tokens:
            usage = decisions.usage
            self.prompt_tokens.labels(label).inc(usage.prompt_tokens)
            self.generated_tokens.labels(label).inc(usage.completion_tokens)
            self._cached.inc(usage.cached_tokens)
            self._prompt_length.observe(usage.prompt_tokens)
            self._answer_length.observe(usage.completion_tokens)


class _LiveCollector(Collector):
    """Counts the requests in flight when it is asked."""

    def __init__(self, live: dict[int, Decisions], labels: DeltaLabels) -> None:
        self._live, self._labels = live, labels

    def collect(self) -> Iterator[GaugeMetricFamily]:
        live = list(self._live.values())
        phases = Tally(decisions.phase for decisions in live)
        in_phase = GaugeMetricFamily(
            "deltaworks_requests_in_flight", "Generation requests in flight, by how far they are.", labels=["phase"]
        )
        for phase in get_args(Phase):
            in_phase.add_metric([phase], phases[phase])
        yield in_phase
        deltas = Tally(self._labels.of(decisions.delta) for decisions in live)
        per_delta = GaugeMetricFamily(
            "deltaworks_delta_requests_in_flight", "Generation requests in flight, by delta.", labels=["delta"]
        )
        for name in {"base", "none", "other", *self._labels.names()}:
            per_delta.add_metric([name], deltas[name])
        yield per_delta
