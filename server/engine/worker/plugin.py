"""Entry point of `vllm.general_plugins`: vLLM calls `register` in every process of its own, possibly more than once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

CONFIG_KEY = "deltaworks"


def register() -> None:
    """Put our manager where both model runners look for the LoRA manager; engines without our key get the stock one.

    The cache keys are wrapped here because the scheduler's process may be another than the workers', and the loading of vocabulary
    tables because the model is loaded before its manager is made.
    """
    from vllm.v1.worker import lora_model_runner_mixin as mixin

    from server.engine.worker import cachekeys, reserve

    cachekeys.install()
    reserve.install(CONFIG_KEY)
    if mixin.LRUCacheWorkerLoRAManager is not choose_manager:
        mixin.LRUCacheWorkerLoRAManager = choose_manager


def choose_manager(vllm_config: VllmConfig, device: torch.device, embedding_modules: dict[str, str]) -> Any:
    """The delta manager for an engine whose `additional_config` has our key, else vLLM's own LoRA manager."""
    settings = vllm_config.additional_config
    if not isinstance(settings, dict) or CONFIG_KEY not in settings:
        from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

        return LRUCacheWorkerLoRAManager(vllm_config, device, embedding_modules)
    from server.engine.worker import compat, runner
    from server.engine.worker.manager import DeltaManager
    from server.engine.worker.orphan import end_with_parent

    compat.check()
    end_with_parent()
    runner.install()
    return DeltaManager(vllm_config, device, settings[CONFIG_KEY])
