"""What vLLM is started with: our settings as its engine arguments, and the environment that it reads at import."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from server.config import EngineSettings
from server.engine.vocabulary import grown_vocabulary

_MAX_CPU_KV_BYTES = 4 << 30


def engine_arguments(base: Path, settings: EngineSettings) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs` for our settings."""
    from vllm.platforms import current_platform

    from server.engine.worker.dtype import cpu_dtype

    on_cpu: bool = current_platform.is_cpu()
    dtype = cpu_dtype() if on_cpu and settings.dtype == "auto" else settings.dtype
    kv_bytes = settings.kv_cache_bytes
    if kv_bytes is None and on_cpu:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        kv_bytes = min(available // 4, _MAX_CPU_KV_BYTES)
    return {
        "model": str(base),
        "served_model_name": base.resolve().name,  # in vLLM's metrics, which are public: no path
        "dtype": dtype,
        "max_model_len": settings.max_model_len,
        "kv_cache_memory_bytes": kv_bytes,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "scheduling_policy": settings.scheduling_policy,
        "enforce_eager": settings.enforce_eager
        or not on_cpu,  # norms, tables and edits cannot be captured in a CUDA graph, and torch's form of a delta neither
        "enable_lora": True,
        "max_loras": settings.deltas_per_batch,
        "max_cpu_loras": max(settings.max_resident_deltas, settings.deltas_per_batch),
        "worker_extension_cls": "server.engine.worker.extension.DeltaWorker",
        # One backend for all: vLLM starts the first one that a request needs and then compiles every grammar with it.
        # White space is JSON's least: small models otherwise write it to the token limit.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "additional_config": {
            "deltaworks": {
                "kernel": settings.kernel,
                "reserved_tokens": settings.reserved_tokens,
                "slots": settings.max_resident_deltas + settings.max_resident_combinations,
            }
        },
        **grown_vocabulary(base, settings.reserved_tokens),
    }


def set_environment(settings: EngineSettings) -> None:
    """vLLM reads these at import and hands them to its child processes; what the user has set stays."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if settings.threads is not None:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
