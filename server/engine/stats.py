"""What vLLM's engine says of its steps: to us, and in the metrics that vLLM keeps itself. Imports vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from prometheus_client import REGISTRY, Metric
from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerBase

from server.core import RowTimes, TokenEvent
from server.engine.base import EngineStep

Observe = Callable[[EngineStep], None]


class StepLogger(StatLoggerBase):  # type: ignore[misc]  # vLLM's classes are untyped for us
    """Hands every step on."""

    def __init__(self, observe: Observe) -> None:
        self._observe = observe

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is None:
            return
        cache, made = scheduler_stats.prefix_cache_stats, iteration_stats
        step = EngineStep(
            running=scheduler_stats.num_running_reqs,
            waiting=scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
            batch=len(made.time_to_first_tokens_iter) + len(made.inter_token_latencies_iter) if made else 0,
            kv_usage=scheduler_stats.kv_cache_usage,
            lookups=cache.queries,
            hits=cache.hits,
            preemptions=made.num_preempted_reqs if made else 0,
            running_deltas={name: rows for name, rows in scheduler_stats.running_lora_adapters.items() if rows},
            waiting_deltas={name: rows for name, rows in scheduler_stats.waiting_lora_adapters.items() if rows},
        )
        self._observe(step)

    def log_engine_initialized(self) -> None: ...


class OwnMetrics(PrometheusStatLogger):  # type: ignore[misc]  # vLLM's classes are untyped for us
    """vLLM's metrics without the one that makes a series of every set of adapters that ran together."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
        super().__init__(vllm_config, engine_indexes)
        per_set: Any = self.gauge_lora_info
        if per_set is not None:
            REGISTRY.unregister(per_set)
            self.gauge_lora_info: Any = None


def stat_loggers(observe: Observe) -> list[Any]:
    """What AsyncLLM takes as `stat_loggers`."""
    return [lambda vllm_config, engine_index: StepLogger(observe), OwnMetrics]


def own_metrics() -> Iterator[Metric]:
    """vLLM registers with the library's default registry, where the process's own metrics are too."""
    for metric in REGISTRY.collect():
        if metric.name.startswith("vllm:"):
            yield metric


def row_times(stats: Any) -> RowTimes | None:
    """From vLLM's record of a row, whose times are the engine's `time.monotonic`."""
    if stats is None or not stats.first_token_ts:
        return None
    return RowTimes(stats.queued_ts, stats.scheduled_ts, stats.first_token_ts)


def timed(event: TokenEvent, stats: Any, begun: set[int]) -> TokenEvent:
    """A choice's first event with its row's times; `begun`: the choices that have had theirs."""
    if event.index in begun:
        return event
    begun.add(event.index)
    return replace(event, times=row_times(stats))
