"""Methods that vLLM adds to its worker class (`worker_extension_cls`); the gateway calls them by name on every worker.

They answer with plain data, also for a delta that cannot be loaded: an exception on this path would lose its type.
"""

from __future__ import annotations

from typing import Any

from vllm.lora.request import LoRARequest

from server.engine.worker.manager import DeltaManager, DeltaUnavailableError
from server.engine.worker.resident import EditLoadError


class DeltaWorker:
    """Mixed into vLLM's worker, which has `model_runner`."""

    model_runner: Any

    def deltaworks_status(self) -> dict[str, Any]:
        """Which manager is in place, its kernel, and whether activations can be edited."""
        manager = getattr(self.model_runner, "lora_manager", None)
        if not isinstance(manager, DeltaManager):
            return {"manager": type(manager).__name__}
        return {"manager": "DeltaManager", "kernel": manager.kernel_name, "edits": manager.edits is not None}

    def deltaworks_load(self, digest: str, adapter_id: int, path: str) -> dict[str, Any]:
        """Make a delta resident: its bytes in execution form, or the reason why not."""
        manager: DeltaManager = self.model_runner.lora_manager
        try:
            manager.add_adapter(LoRARequest(digest, adapter_id, path))
        except DeltaUnavailableError as error:
            return {"error": str(error)}
        return {"nbytes": manager.resident_bytes()[adapter_id]}

    def deltaworks_combine(self, digest: str, adapter_id: int, parts: list[tuple[int, float]]) -> dict[str, Any]:
        """Make a weighted sum of resident deltas resident: the bytes that it takes beside theirs, or the reason why not."""
        manager: DeltaManager = self.model_runner.lora_manager
        try:
            manager.combine(adapter_id, digest, parts)
        except DeltaUnavailableError as error:
            return {"error": str(error)}
        return {"nbytes": manager.resident_bytes()[adapter_id]}

    def deltaworks_unload(self, adapter_id: int) -> bool:
        """Drop a delta; False when it was not resident."""
        manager: DeltaManager = self.model_runner.lora_manager
        return manager.remove_adapter(adapter_id)

    def deltaworks_edit_load(self, fingerprint: str, spec: str) -> dict[str, str]:
        """Make an edit resident: empty, or {"error": reason}, or {"unavailable": reason} where no edit can work."""
        manager: DeltaManager = self.model_runner.lora_manager
        if manager.edits is None:
            return {
                "unavailable": "this engine cannot edit activations: the served model has no layer list that we know"
            }
        try:
            manager.edits.load(fingerprint, spec)
        except EditLoadError as error:
            return {"error": str(error)}
        return {}

    def deltaworks_edit_unload(self, fingerprint: str) -> bool:
        """Drop an edit; False when it was not resident."""
        manager: DeltaManager = self.model_runner.lora_manager
        return manager.edits is not None and manager.edits.unload(fingerprint)

    def deltaworks_edit_report(self, ticket: str) -> dict[str, Any] | None:
        """What was done for a request so far, told once; None when there is nothing to tell."""
        manager: DeltaManager = self.model_runner.lora_manager
        return None if manager.edits is None else manager.edits.report(ticket)
