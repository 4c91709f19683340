"""Whether the Triton kernels can run here. Asked before they are imported: without a GPU nobody needs Triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch


def triton_problem(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on tensors of `device`; None where they can. Triton's interpreter runs them on CPUs."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"Triton needs a GPU, not {device.type!r}; TRITON_INTERPRET=1 runs it on a CPU, thousands of times slower"
        )
    if find_spec("triton") is None:
        return "Triton is not installed; vLLM for GPUs brings it"
    return None


def gpu_problem() -> str | None:
    """Why nothing can be measured on a GPU here; None where it can."""
    return triton_problem(torch.device("cuda")) if torch.cuda.is_available() else "torch finds no GPU"
