"""vLLM's names for what routers and boards made for vLLM read: the gateway's facts, on a page of their own (/metrics/compat)."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from server.metrics.engine import EngineMetrics
from server.metrics.generation import GenerationMetrics
from server.metrics.http import GENERATION_ROUTES, HTTPMetrics

_FINISHED = ("stop", "length", "tool_calls", "cancelled", "error")
# As vLLM says it: an answer of calls has stopped, one that nobody waits for was aborted.
_AS_VLLM = {"tool_calls": "stop", "cancelled": "abort"}


class CompatCollector(Collector):
    """`names`: digest -> the names that requests use for it. `max_lora`: deltas that fit into one batch."""

    def __init__(
        self,
        model: str,
        max_lora: int,
        names: Callable[[str], Iterable[str]],
        engine: EngineMetrics,
        generation: GenerationMetrics,
        http: HTTPMetrics,
    ) -> None:
        self._model, self._max_lora, self._names = model, max_lora, names
        self._engine, self._generation, self._http = engine, generation, http

    def collect(self) -> Iterator[Metric]:
        step = self._engine.last
        yield self._gauge("num_requests_running", "Rows in the engine's batch.", step.running)
        yield self._gauge("num_requests_waiting", "Rows that wait in the engine.", step.waiting)
        yield self._gauge("kv_cache_usage_perc", "Part of the KV cache in use; 1 is all of it.", step.kv_usage)
        # A gauge of our own making, so that the newest set is the only series: every other set was another one.
        lora = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Deltas with rows in the batch and with rows that wait; the value is the time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        sets = [self._joined(step.running_deltas), self._joined(step.waiting_deltas)]
        lora.add_metric([str(self._max_lora), *sets], time.time())
        yield lora
        made = self._generation
        yield self._histogram("time_to_first_token_seconds", "Time to the first token.", made.ttft)
        yield self._histogram("inter_token_latency_seconds", "Time between two tokens.", made.gaps)
        yield self._histogram(
            "e2e_request_latency_seconds",
            "Time to the end of the answer.",
            self._http.duration,
            lambda labels: labels["route"] in GENERATION_ROUTES and labels["outcome"] == "ok",
        )
        yield self._counter("prompt_tokens", "Tokens of prompts.", _total(made.prompt_tokens.collect()))
        yield self._counter("generation_tokens", "Tokens of answers.", _total(made.generated_tokens.collect()))
        ended: dict[str, float] = defaultdict(float)
        for reason in _FINISHED:
            ended[_AS_VLLM.get(reason, reason)] += _total(made.finished.collect(), reason=reason)
        success = CounterMetricFamily(
            "vllm:request_success", "Choices by how they ended.", labels=["model_name", "finished_reason"]
        )
        for reason, value in ended.items():
            success.add_metric([self._model, reason], value)
        yield success

    def _joined(self, rows: Mapping[str, int]) -> str:
        """A combination has no name and is left out."""
        return ",".join(sorted({name for digest in rows for name in self._names(digest)}))

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _histogram(
        self, name: str, text: str, ours: Histogram, wanted: Callable[[dict[str, str]], bool] = lambda labels: True
    ) -> Metric:
        """One of our histograms, its label sets added up."""
        buckets: dict[str, float] = defaultdict(float)
        total = 0.0
        for sample in (sample for metric in ours.collect() for sample in metric.samples if wanted(sample.labels)):
            if sample.name.endswith("_bucket"):
                buckets[sample.labels["le"]] += sample.value
            elif sample.name.endswith("_sum"):
                total += sample.value
        family = HistogramMetricFamily(f"vllm:{name}", text, labels=["model_name"])
        family.add_metric([self._model], buckets=list(buckets.items()), sum_value=total)
        return family


def _total(metrics: Iterable[Metric], **labels: str) -> float:
    samples = (sample for metric in metrics for sample in metric.samples if sample.name.endswith("_total"))
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())
