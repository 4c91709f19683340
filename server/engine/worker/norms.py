"""Norms of a fine-tune: the rows of a delta are normalised as by the base and scaled by the fine-tune's own vectors.

Adding the change to the base's output would round twice in bf16, so those rows are computed anew, in fp32, with the summed
weights unrounded. x [T, d] or, for norms of single heads, [T, heads, d].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm

from server.engine.worker.ops import define_op
from server.engine.worker.placement import PlacementError
from server.engine.worker.rows import StepRows

NORMS = (RMSNorm, GemmaRMSNorm, LayerNorm, torch.nn.LayerNorm)


@dataclass(frozen=True, eq=False)
class _Group:
    rows: torch.Tensor  # int64 [t]
    slots: torch.Tensor  # int64 [t], into the vectors
    weights: torch.Tensor  # fp32 [slots, d]
    biases: torch.Tensor | None


@dataclass(eq=False)
class DeltaNorm:
    """The fine-tunes resident on one norm. `resident`: vectors [d] in fp32 by adapter, "weight" and perhaps "bias", whole."""

    module: torch.nn.Module
    rows: StepRows
    key: str
    resident: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    _plan: Any = None
    _group: _Group | None = None

    def prepare(self, leaf: str, delta: torch.Tensor) -> torch.Tensor:
        """The fine-tune's vector: the base's `leaf` plus `delta`. Raises PlacementError."""
        base = getattr(self.module, leaf, None)
        if not isinstance(base, torch.Tensor):
            raise PlacementError(f"{self.key}: the served norm has no {leaf}")
        if base.shape != delta.shape:
            raise PlacementError(
                f"{self.key}: the delta has shape {list(delta.shape)}, the served norm {list(base.shape)}"
            )
        if getattr(self.module, "variance_size_override", None) is not None:
            raise PlacementError(f"{self.key}: norms over a part of their input are not served per request")
        return base.detach().float() + delta.to(base.device)

    def combine(self, parts: Sequence[tuple[int, float]]) -> dict[str, torch.Tensor]:
        """The vectors of a weighted sum of resident fine-tunes: the base's plus every (adapter, weight)'s change; may be none."""
        combined: dict[str, torch.Tensor] = {}
        for adapter, weight in parts:
            for leaf, vector in self.resident.get(adapter, {}).items():
                base = self._base(leaf)
                combined[leaf] = combined.get(leaf, base) + weight * (vector - base)
        return combined

    def forget(self) -> None:
        self._plan = self._group = None

    def wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        rows, key = self.rows, self.key

        @functools.wraps(forward)
        def normed(x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
            output = forward(x) if residual is None else forward(x, residual)
            # The fused form may overwrite its input; the sum that it normalised comes back as the new residual.
            out, source = (output, x) if residual is None else output
            if torch.compiler.is_compiling():
                torch.ops.deltaworks.renorm(out, source, key)
            elif rows.plan is not None:
                self.apply(out, source)
            return output

        return normed

    def apply(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """Write the fine-tunes' norms of `x` into their rows of `out`."""
        if self.rows.plan is not self._plan:
            self._plan, self._group = self.rows.plan, self._grouped()
        group = self._group
        if group is None:
            return
        h = x.index_select(0, group.rows).float()
        weights = group.weights.index_select(0, group.slots)
        heads = (len(weights), *[1] * (h.dim() - 2), weights.shape[1])
        if isinstance(self.module, RMSNorm | GemmaRMSNorm):
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.module.variance_epsilon)
            weights = weights + 1.0 if isinstance(self.module, GemmaRMSNorm) else weights
        else:
            h = torch.nn.functional.layer_norm(h, h.shape[-1:], eps=float(self.module.eps))  # type: ignore[arg-type]
        h = h * weights.view(heads)
        if group.biases is not None:
            h = h + group.biases.index_select(0, group.slots).view(heads)
        out.index_copy_(0, group.rows, h.to(out.dtype))

    def _grouped(self) -> _Group | None:
        found = [(rows, self.resident[adapter]) for adapter, rows in self.rows.groups if adapter in self.resident]
        if not found:
            return None
        slots = [torch.full_like(rows, slot) for slot, (rows, _) in enumerate(found)]
        stacked = {
            leaf: torch.stack([vectors[leaf] if leaf in vectors else self._base(leaf) for _, vectors in found])
            for leaf in ("weight", "bias")
            if isinstance(getattr(self.module, leaf, None), torch.Tensor)
        }
        return _Group(torch.cat([rows for rows, _ in found]), torch.cat(slots), stacked["weight"], stacked.get("bias"))

    def _base(self, leaf: str) -> torch.Tensor:
        base: torch.Tensor = getattr(self.module, leaf)
        return base.detach().float()


def wrap_norms(model: torch.nn.Module, rows: StepRows, forward_context: dict[str, Any]) -> dict[str, DeltaNorm]:
    """Wrap every norm of `model`; returns them by module name."""
    define_op(renorm, changes="out")
    wrapped = {}
    for name, module in model.named_modules():
        if isinstance(module, NORMS):
            norm = DeltaNorm(module, rows, f"deltaworks.norm.{name}")
            forward_context[norm.key] = norm
            module.forward = norm.wrap(module.forward)  # type: ignore[method-assign]  # one instance, not the class
            wrapped[name] = norm
    return wrapped


def renorm(out: torch.Tensor, x: torch.Tensor, name: str) -> None:
    """The op of compiled graphs; `name` is the norm's key in vLLM's layer table."""
    norm: DeltaNorm = get_forward_context().no_compile_layers[name]
    if norm.rows.plan is not None:
        norm.apply(out, x)
