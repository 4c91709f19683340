"""The delta manager: vLLM's LoRA control plane (load, list, drop, per-step map) over our data plane.

The gateway decides what is resident (server/artifacts/pool.py); this manager never evicts on its own account, and a request
for a delta that is not resident is our own bug, which stops the engine rather than let the base answer in its place.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compressors.artifact import Artifact
from compressors.errors import DeltaError, SlotError
from compressors.execution import SparseFactor, native_masks, outside_projections, sparse_factor
from compressors.factors import MaskSource
from compressors.kernels.build import KernelUnavailableError
from compressors.kernels.gpu import triton_problem
from compressors.kernels.native import NativeKernel, NativeSparse
from compressors.kernels.torch_csr import TorchCsr
from compressors.masks import factor_rows
from server.engine.worker.edits import EditPlane
from server.engine.worker.linear import DeltaLinear, DeltaState, Kernel, op_library, wrap_linears
from server.engine.worker.memory import release_memory
from server.engine.worker.outside import OutsidePlane, Prepared
from server.engine.worker.placement import Placement, PlacementError
from server.engine.worker.plan import Planner
from server.engine.worker.reserve import RESERVE_KEY
from server.engine.worker.slots import SlotPlane

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.request import LoRARequest
    from vllm.model_executor.layers.linear import LinearBase

logger = logging.getLogger("deltaworks.worker")


class DeltaUnavailableError(Exception):
    """A delta cannot be made resident; the message says which tensor and why."""


class DeltaManager:
    """Same interface as vLLM's `LRUCacheWorkerLoRAManager`, which both model runners call."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, settings: dict[str, Any]) -> None:
        self._config = vllm_config
        self._device = device
        self._planner = Planner()
        self._resident_bytes: dict[int, int] = {}
        self._masks: MaskSource = factor_rows
        self._slots: SlotPlane | None = None  # on GPUs
        self._state = DeltaState(self._kernel(settings))
        self._reserved: int = settings.get(RESERVE_KEY, 0)
        self.edits: EditPlane | None = None  # None also later, when the model has no layers that we can edit
        op_library()

    # Life of the manager

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> torch.nn.Module:
        """Wrap the linears and the decoder layers of the loaded base model; called once, before the first forward."""
        context = vllm_config.compilation_config.static_forward_context
        wrapped = wrap_linears(model, context, self._deltas_of)
        self._linears = {name: linear for name, (_, linear) in wrapped.items()}
        self._placement = Placement(model, {name: module for name, (module, _) in wrapped.items()})
        self._outside = OutsidePlane(model, self._placement, context, self._device, self._reserved)
        self.edits = EditPlane.create(model, vllm_config, self._device)
        logger.info("delta plane: %d linears, kernel %s", len(wrapped), self._state.kernel.name)
        return model

    def _kernel(self, settings: dict[str, Any]) -> Kernel:
        wanted = settings.get("kernel", "auto")
        if wanted == "triton" or (wanted == "auto" and self._device.type == "cuda"):
            problem = triton_problem(self._device)
            if problem is None:
                self._slots = SlotPlane.create(self._config, self._device, settings["slots"])
                return self._slots.kernel
            if wanted == "triton":
                raise KernelUnavailableError(problem)
            logger.warning("deltas are served with torch CSR: %s", problem)
        if self._device.type != "cpu" or wanted == "torch":
            return TorchCsr(self._device)
        try:
            kernel = NativeKernel.load()
        except KernelUnavailableError as error:
            if wanted == "native":
                raise
            logger.warning("deltas are served with torch CSR, several times slower than the C++ kernel: %s", error)
            return TorchCsr(self._device)
        self._masks = native_masks(kernel.kept_rows)
        return NativeSparse(kernel, torch.get_num_threads())

    def _deltas_of(self, module: LinearBase) -> DeltaLinear:
        return DeltaLinear(self._state) if self._slots is None else self._slots.linear(self._state, module)

    # Deltas

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Load the artifact at `lora_path` into execution form; False when it is resident already."""
        adapter = lora_request.lora_int_id
        if adapter in self._resident_bytes:
            return False
        started = time.perf_counter()
        kernel = self._state.kernel
        loaded, outside = self._load(Path(lora_request.lora_path), lora_request.lora_name)
        try:
            ready = {name: kernel.prepare(factors) for name, factors in loaded.items()}
        except torch.OutOfMemoryError as error:  # of a GPU
            raise DeltaUnavailableError(f"delta {lora_request.lora_name:.12} cannot be loaded: {error}") from error
        nbytes = outside.nbytes + sum(kernel.nbytes(prepared) for prepared in ready.values())
        self._install(adapter, lora_request.lora_name, {name: (prepared,) for name, prepared in ready.items()})
        self._outside.install(adapter, outside)
        self._resident_bytes[adapter] = nbytes
        self._forget_plans()
        release_memory()  # what decoding needed
        took = time.perf_counter() - started
        logger.info("delta %.12s resident: %d bytes in %.2f s", lora_request.lora_name, nbytes, took)
        logger.info(
            "delta %.12s is applied by %s: %s", lora_request.lora_name, kernel.name, kernel.describe(ready.values())
        )
        return True

    def combine(self, adapter: int, digest: str, parts: Sequence[tuple[int, float]]) -> None:
        """Make a weighted sum of resident deltas (adapter id, weight) resident, sharing their entries.

        Raises DeltaUnavailableError.
        """
        if adapter in self._resident_bytes:
            return
        for part, _ in parts:
            if part not in self._resident_bytes:
                raise DeltaUnavailableError(f"combination {digest:.12} has a part that is not resident")
        kernel = self._state.kernel
        outside = self._outside.combine(parts)
        nbytes, scaled = outside.nbytes, {}
        for name, linear in self._linears.items():
            held = [(one, weight) for part, weight in parts for one in linear.resident.get(part, ())]
            if held:
                scaled[name] = tuple(kernel.scaled(one, weight) for one, weight in held)
                nbytes += sum(kernel.nbytes(one) for one in scaled[name])
        self._install(adapter, digest, scaled)
        self._outside.install(adapter, outside)
        self._resident_bytes[adapter] = nbytes
        self._forget_plans()

    def _install(self, adapter: int, digest: str, parts: dict[str, tuple[Any, ...]]) -> None:
        if self._slots is not None:
            try:
                self._slots.admit(adapter, [(self._linears[name], held) for name, held in parts.items()])
            except SlotError as error:
                raise DeltaUnavailableError(f"delta {digest:.12} cannot be loaded: {error}") from error
        for name, held in parts.items():
            self._linears[name].install(adapter, held)

    def _load(self, path: Path, digest: str) -> tuple[dict[str, list[SparseFactor]], Prepared]:
        loaded: dict[str, list[SparseFactor]] = {}
        try:
            with Artifact.open(path) as artifact:
                outside = self._outside.prepare(artifact)
                for name, record in artifact.records.items():
                    if record.kind == "zero" or outside_projections(record):
                        continue
                    place = self._placement.place(name, (record.shape[0], record.shape[1]))
                    factor = sparse_factor(artifact, name, place.shard, self._masks)
                    loaded.setdefault(place.linear, []).append(factor)
        except (OSError, DeltaError, PlacementError) as error:
            raise DeltaUnavailableError(f"delta {digest:.12} cannot be loaded: {error}") from error
        return loaded, outside

    def remove_adapter(self, adapter_id: int) -> bool:
        """Drop a delta from memory; False when it was not resident."""
        if self._resident_bytes.pop(adapter_id, None) is None:
            return False
        self._forget_plans()
        self._outside.remove(adapter_id)
        for linear in self._linears.values():
            linear.drop(adapter_id)
        if self._slots is not None:
            self._slots.numbers.release(adapter_id)
        release_memory()
        return True

    def remove_all_adapters(self) -> None:
        for adapter in list(self._resident_bytes):
            self.remove_adapter(adapter)

    def list_adapters(self) -> set[int]:
        return set(self._resident_bytes)

    def resident_bytes(self) -> dict[int, int]:
        """Bytes in execution form by adapter id."""
        return dict(self._resident_bytes)

    @property
    def kernel_name(self) -> str:
        return self._state.kernel.name

    def pin_adapter(self, adapter_id: int) -> bool:
        """Every resident delta stays until the gateway drops it, so it is pinned already."""
        return adapter_id in self._resident_bytes

    # Each step

    def set_active_adapters(self, requests: set[LoRARequest], mapping: LoRAMapping | None) -> None:
        """Build the plan of the coming step from the adapter id of every token row."""
        for request in requests:
            if request.lora_int_id not in self._resident_bytes:
                raise DeltaUnavailableError(f"delta {request.lora_name:.12} was scheduled but is not resident")
        if mapping is not None:
            self._state.plan = self._planner.plan(mapping.index_mapping)
            self._outside.begin(self._state.plan, mapping.prompt_mapping)
            if self._slots is not None:
                self._slots.begin(self._state.plan)

    def scoring(self, adapter: int) -> AbstractContextManager[None]:
        """While the prompt of a request to `adapter` (0: the base) is scored: all its positions go through the head."""
        return self._outside.scoring(adapter)

    def _forget_plans(self) -> None:
        self._state.plan = None
        self._planner.forget()
        self._outside.forget()
        for linear in self._linears.values():
            linear.forget()

    # Warm-up of the runners: a dummy delta changes nothing

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        yield

    def add_dummy_lora(self, lora_request: LoRARequest, rank: int) -> bool:
        self._resident_bytes[lora_request.lora_int_id] = 0
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        return False
