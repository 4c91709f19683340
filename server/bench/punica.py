"""vLLM's LoRA kernels (after Punica), as the rival of our kernel on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def dense_lora(y: Any, x: Any, a: Any, b: Any, slots: Any) -> Callable[[], None]:
    """Of tensors: y [T, m] += (x [T, n] a[slot]^T) b[slot]^T on each call.

    As `PunicaWrapperGPU.add_lora_linear` does it for one slice.
    """
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    num_rows, count = len(x), len(a)
    meta = LoRAKernelMeta.make(count, num_rows, x.device)
    meta.prepare_tensors(slots)
    arguments = meta.meta_args(num_rows, False)
    h = x.new_empty((1, num_rows, a.shape[1])).float()

    def call() -> None:
        lora_shrink(x, [a], h, *arguments, 1.0)
        lora_expand(h, [b], y, *arguments, offset_start=0, add_inputs=True)

    return call
