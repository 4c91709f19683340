"""What vLLM hands its stat loggers, made by its own classes without an engine, becomes our steps and its own page."""

from pathlib import Path

import pytest

from server.core import RowTimes
from server.engine.arguments import engine_arguments
from server.engine.base import EngineStep
from tests.engine.bed import engine_settings

pytestmark = pytest.mark.engine


def test_a_step_reaches_us_and_vllms_own_metrics(tiny_base: Path) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.stats import IterationStats, PrefixCacheStats, SchedulerStats

    from server.engine.stats import own_metrics, stat_loggers

    arguments = engine_arguments(tiny_base, engine_settings())
    config = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.ENGINE_CONTEXT)
    seen: list[EngineStep] = []
    manager = StatLoggerManager(config, [0], stat_loggers(seen.append), enable_default_loggers=False)
    manager.log_engine_initialized()
    cache = PrefixCacheStats()
    cache.record(num_tokens=128, num_hits=32, preempted=False)
    scheduled = SchedulerStats(
        num_running_reqs=3,
        num_waiting_reqs=1,
        num_skipped_waiting_reqs=1,
        kv_cache_usage=0.5,
        prefix_cache_stats=cache,
        running_lora_adapters={"a": 2, "b": 0},
        waiting_lora_adapters={"b": 1},
    )
    made = IterationStats()
    made.time_to_first_tokens_iter.append(0.1)
    made.inter_token_latencies_iter += [0.1, 0.2]
    made.num_preempted_reqs = 4
    manager.record(scheduled, made)
    manager.record(SchedulerStats(), None)
    manager.record(None, None)
    step = EngineStep(3, 2, 3, 0.5, 128, 32, 4, {"a": 2}, {"b": 1})
    assert seen == [step, EngineStep()]
    own = {metric.name: metric for metric in own_metrics()}
    assert all(name.startswith("vllm:") for name in own)
    assert "vllm:lora_requests_info" not in own
    (queried,) = (sample for sample in own["vllm:prefix_cache_queries"].samples if sample.name.endswith("_total"))
    assert (queried.value, queried.labels["model_name"]) == (128, tiny_base.name)


def test_times_of_a_row() -> None:
    from vllm.v1.metrics.stats import RequestStateStats

    from server.engine.stats import row_times

    assert row_times(None) is None
    assert row_times(RequestStateStats(queued_ts=1.0, scheduled_ts=2.0)) is None
    assert row_times(RequestStateStats(queued_ts=1.0, scheduled_ts=2.0, first_token_ts=3.0)) == RowTimes(1.0, 2.0, 3.0)
