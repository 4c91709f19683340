"""Every name of vLLM that our worker code touches, with the parameters it must have.

vLLM gives no stability promise for these. A changed name must stop the server at start: otherwise the base model could
answer in a delta's place without a word.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass

TESTED_MINOR = "0.32"


class IncompatibleEngineError(Exception):
    """This vLLM lacks a name that we rest on; the message lists all of them."""


@dataclass(frozen=True)
class Touched:
    """A callable of vLLM and the parameters that we use, a subset of those it takes."""

    module: str
    path: str
    parameters: tuple[str, ...] = ()


TOUCHED: tuple[Touched, ...] = (
    # The manager: built by both runners from one name in one module, and called with these arguments.
    Touched(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LRUCacheWorkerLoRAManager",
        ("vllm_config", "device", "embedding_modules"),
    ),
    Touched(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin.load_lora_model",
        ("model", "vllm_config", "device"),
    ),
    Touched(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin._set_active_loras",
        ("prompt_lora_mapping", "token_lora_mapping", "lora_requests"),
    ),
    Touched("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.create_lora_manager", ("model", "vllm_config")),
    Touched("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.set_active_adapters", ("requests", "mapping")),
    Touched("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.add_adapter", ("lora_request",)),
    Touched("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.add_dummy_lora", ("lora_request", "rank")),
    Touched("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.get_dummy_lora_warmup_rank", ("default_rank",)),
    Touched("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.dummy_lora_cache"),
    Touched("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.remove_adapter", ("adapter_id",)),
    Touched("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.pin_adapter", ("adapter_id",)),
    Touched("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.list_adapters"),
    Touched("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.remove_all_adapters"),
    Touched("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.supports_tower_connector_lora"),
    # What a fine-tune changes outside its projections.
    Touched("vllm.model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbedding.forward", ("input_",)),
    Touched("vllm.model_executor.layers.vocab_parallel_embedding", "ParallelLMHead"),
    Touched(
        "vllm.model_executor.layers.logits_processor",
        "LogitsProcessor._apply_head",
        ("lm_head", "hidden_states", "embedding_bias"),
    ),
    Touched("vllm.model_executor.layers.logits_processor", "LogitsProcessor.forward", ("lm_head", "hidden_states")),
    # The reserve of added tokens: tables larger than the checkpoint's.
    Touched(
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "VocabParallelEmbedding.weight_loader",
        ("param", "loaded_weight"),
    ),
    Touched("vllm.engine.arg_utils", "EngineArgs", ("hf_overrides", "additional_config")),
    Touched("vllm.config", "get_current_vllm_config"),
    Touched("vllm.model_executor.layers.layernorm", "LayerNorm.forward_native", ("x",)),
    Touched("vllm.lora.layers", "LoRAMapping", ("index_mapping", "prompt_mapping")),
    Touched("vllm.lora.request", "LoRARequest"),
    # The V2 runner (GPU) reaches the manager through the same mixin.
    Touched(
        "vllm.v1.worker.gpu.lora_utils",
        "LoraState.make_lora_inputs",
        ("req_ids", "idx_mapping", "num_scheduled_tokens"),
    ),
    # The data plane: linears call their quant method, fused linears know their parts.
    Touched("vllm.model_executor.layers.linear", "LinearMethodBase.apply", ("layer", "x", "bias")),
    Touched("vllm.model_executor.layers.linear", "LinearBase"),
    Touched("vllm.model_executor.layers.linear", "QKVParallelLinear"),
    Touched("vllm.model_executor.layers.linear", "RowParallelLinear"),
    Touched("vllm.model_executor.layers.linear", "ColumnParallelLinear"),
    Touched("vllm.model_executor.utils", "get_packed_modules_mapping", ("model",)),
    Touched("vllm.utils.torch_utils", "direct_register_custom_op", ("op_name", "op_func", "mutates_args", "fake_impl")),
    # KV and prefix-cache keys: the delta's digest travels as the LoRA name.
    Touched("vllm.v1.core.kv_cache_utils", "_gen_lora_extra_hash_keys", ("request",)),
    Touched("vllm.v1.engine.async_llm", "AsyncLLM.add_lora", ("lora_request",)),
    Touched("vllm.v1.engine.async_llm", "AsyncLLM.remove_lora", ("lora_id",)),
    Touched("vllm.v1.engine.async_llm", "AsyncLLM.collective_rpc", ("method",)),
    # Text of a delta with a tokenizer of its own (server/engine/decoding.py).
    Touched("vllm.v1.engine.output_processor", "OutputProcessor.__init__", ("tokenizer",)),
    Touched("vllm.v1.engine.output_processor", "OutputProcessor.add_request", ("request",)),
    Touched("vllm.v1.engine", "EngineCoreRequest", ("lora_request",)),
    # Edits: where the decoder layers are, and what their output means.
    Touched("vllm.config", "ModelConfig.get_total_num_hidden_layers"),
    Touched("vllm.config", "ModelConfig.get_hidden_size"),
    Touched("vllm.model_executor.layers.layernorm", "RMSNorm.forward_native", ("x", "residual")),
    Touched("vllm.model_executor.layers.layernorm", "GemmaRMSNorm.forward_native", ("x", "residual")),
    Touched("vllm.forward_context", "get_forward_context"),
    # Edits: which rows are whose. V1 runs on CPUs, V2 on GPUs; the request data comes through the scheduler's output.
    Touched("vllm.sampling_params", "SamplingParams", ("extra_args",)),
    Touched("vllm.v1.core.sched.output", "NewRequestData", ("req_id", "sampling_params", "num_computed_tokens")),
    Touched("vllm.v1.core.sched.output", "NewRequestData.prompt_len"),
    Touched("vllm.v1.core.sched.output", "SchedulerOutput", ("scheduled_new_reqs", "finished_req_ids")),
    Touched("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.execute_model", ("scheduler_output",)),
    Touched(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._prepare_inputs",
        ("scheduler_output", "num_scheduled_tokens"),
    ),
    Touched(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._get_prompt_logprobs_dict",
        ("hidden_states", "num_scheduled_tokens"),
    ),
    Touched("vllm.v1.worker.gpu_input_batch", "InputBatch.req_ids"),
    Touched("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.execute_model", ("scheduler_output",)),
    Touched(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.prepare_inputs",
        ("scheduler_output", "batch_req_state"),
    ),
    Touched(
        "vllm.v1.worker.gpu.input_batch", "InputBatch", ("req_ids", "query_start_loc_np", "num_computed_tokens_np")
    ),
    # Edits: the keys of the blocks that hold an edited position.
    Touched(
        "vllm.v1.core.kv_cache_utils",
        "generate_block_hash_extra_keys",
        ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
    ),
    Touched("vllm.v1.core.block_pool", "generate_block_hash_extra_keys"),
    Touched("vllm.v1.request", "Request.__init__", ("sampling_params", "prompt_token_ids")),
    # How the engine is started: the worker in the engine's process.
    Touched(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.__init__",
        ("vllm_config", "executor_class", "log_stats", "log_requests", "stat_loggers"),
    ),
    # What the engine says of its steps and rows.
    Touched(
        "vllm.v1.metrics.loggers",
        "StatLoggerBase.record",
        ("scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
    ),
    Touched("vllm.v1.metrics.loggers", "PrometheusStatLogger.__init__", ("vllm_config", "engine_indexes")),
    Touched(
        "vllm.v1.metrics.stats",
        "SchedulerStats",
        (
            "num_running_reqs",
            "num_waiting_reqs",
            "num_skipped_waiting_reqs",
            "kv_cache_usage",
            "prefix_cache_stats",
            "running_lora_adapters",
            "waiting_lora_adapters",
        ),
    ),
    Touched("vllm.v1.metrics.stats", "PrefixCacheStats", ("queries", "hits")),
    Touched("vllm.v1.metrics.stats", "RequestStateStats", ("queued_ts", "scheduled_ts", "first_token_ts")),
    Touched("vllm.engine.arg_utils", "EngineArgs.create_engine_config", ("usage_context",)),
    Touched("vllm.utils.ompmultiprocessing", "OMPProcessManager.configure_omp_envs", ("rank", "local_rank")),
    Touched("vllm.v1.executor.uniproc_executor", "UniProcExecutor"),
)


def problems(touched: tuple[Touched, ...] = TOUCHED) -> list[str]:
    """One line per touched name that is missing or lacks a parameter; empty when this vLLM fits."""
    return [problem for name in touched if (problem := _problem(name)) is not None]


def check() -> None:
    """Raises IncompatibleEngineError naming everything that does not fit."""
    found = problems()
    if found:
        raise IncompatibleEngineError(
            f"this vLLM does not fit Deltaworks (tested with {TESTED_MINOR}): " + "; ".join(found)
        )


def _problem(touched: Touched) -> str | None:
    label = f"{touched.module}.{touched.path}"
    try:
        found: object = importlib.import_module(touched.module)
    except ImportError as error:
        return f"{touched.module} does not import ({error})"
    for part in touched.path.split("."):
        if not hasattr(found, part):
            return f"{label} is missing"
        found = getattr(found, part)
    if not touched.parameters:
        return None
    if not callable(found):
        return f"{label} is not callable"
    missing = set(touched.parameters) - set(inspect.signature(found).parameters)
    return f"{label} lacks the parameters {sorted(missing)}" if missing else None
