"""Vocabulary tables of a fine-tune: changed rows of the token embedding and of the head, for the rows of a delta.

Legend: T token rows of the step, s sampled rows, t rows of one delta, n changed rows of its table, d width, V vocabulary with the
reserve (reserve.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from server.engine.worker.ops import define_op
from server.engine.worker.reserve import ReserveError
from server.engine.worker.rows import StepRows

_BLOCK = 8192  # changed rows of a head at once: bounds the fp32 copy


@dataclass(frozen=True, eq=False)
class RowTable:
    """Changed rows as stored: `index` int64 [n] ascending, `values` [n, d] in int8 or floats, `scale` fp32 [n] for int8.

    The rows count `weight` times: in a combination of deltas, which shares its parts' tensors.
    """

    index: torch.Tensor
    values: torch.Tensor
    scale: torch.Tensor | None
    weight: float = 1.0

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.index, self.values, self.scale) if part is not None)

    def within(self, start: int, end: int) -> RowTable:
        """Rows [start, end) of the vocabulary, renumbered from 0: the shard of one worker."""
        low, high = (
            int(n) for n in torch.searchsorted(self.index, torch.tensor([start, end], device=self.index.device))
        )
        scale = None if self.scale is None else self.scale[low:high]
        return RowTable(self.index[low:high] - start, self.values[low:high], scale, self.weight)

    def lookup(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of `ids` [t] have changed rows, int64 [h], and those rows, fp32 [h, d]."""
        at = torch.searchsorted(self.index, ids).clamp_(max=len(self.index) - 1)
        hits = (self.index[at] == ids).nonzero()[:, 0]
        at = at[hits]
        rows = self.values.index_select(0, at).float()
        rows = rows if self.scale is None else rows * self.scale[at, None]
        return hits, rows if self.weight == 1.0 else rows * self.weight

    def add_logits(self, scores: torch.Tensor, x: torch.Tensor) -> None:
        """scores fp32 [t, V] += x fp32 [t, d] by the changed rows, in place."""
        for start in range(0, len(self.index), _BLOCK):
            block = slice(start, start + _BLOCK)
            part = x @ self.values[block].float().T  # int8 is exact in fp32, so the scale may follow the product
            part = part if self.scale is None else part * self.scale[block]
            scores.index_add_(1, self.index[block], part, alpha=self.weight)


@dataclass(eq=False)
class DeltaEmbedding:
    """The tables resident on the token embedding. Every worker holds all changed rows: they are added behind the all-reduce."""

    module: VocabParallelEmbedding
    rows: StepRows
    key: str
    resident: dict[int, tuple[RowTable, ...]] = field(default_factory=dict)  # one, or those of a combination's parts

    def wrap(self, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        rows, key = self.rows, self.key

        @functools.wraps(forward)
        def embedded(input_: torch.Tensor) -> torch.Tensor:
            output = forward(input_)
            if torch.compiler.is_compiling():
                torch.ops.deltaworks.add_embedding(output, input_, key)
            elif rows.plan is not None:
                self.add(output, input_)
            return output

        return embedded

    def add(self, output: torch.Tensor, ids: torch.Tensor) -> None:
        """output [T, d] += the changed rows of the tokens `ids` [T], in place."""
        if not self.module.reduce_results and self.module.tp_rank > 0:  # summed later: one worker's addition is enough
            return
        for adapter, rows in self.rows.groups:
            tables = self.resident.get(adapter)
            if tables is not None:
                mine = ids.index_select(0, rows).long()
                embedded = output.index_select(0, rows).float()
                for table in tables:
                    hits, change = table.lookup(mine)
                    embedded.index_add_(0, hits, change)
                output.index_copy_(0, rows, embedded.to(output.dtype))


@dataclass(eq=False)
class DeltaHead:
    """The tables resident on the head, each cut to this worker's shard of the vocabulary. `rows` are the sampled rows.

    The last `reserved` tokens are nobody's but of the deltas that `added` names, each with how many of them it has.
    """

    shard: tuple[int, int]
    rows: StepRows
    reserved: int = 0
    resident: dict[int, tuple[RowTable, ...]] = field(default_factory=dict)  # one, or those of a combination's parts
    added: dict[int, int] = field(default_factory=dict)
    scoring: int | None = None  # all rows are of one prompt, to this adapter; 0 is the base

    def wrap(self, apply_head: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(apply_head)
        def projected(lm_head: Any, hidden_states: torch.Tensor, embedding_bias: torch.Tensor | None) -> torch.Tensor:
            logits = apply_head(lm_head, hidden_states, embedding_bias)
            self.add(logits, hidden_states)
            return logits

        return projected

    def add(self, logits: torch.Tensor, x: torch.Tensor) -> None:
        """logits [s, V] += x [s, d] by the changed rows of each sampled row's delta, in place."""
        for adapter, rows in self._groups(x):
            tables = [table for table in self.resident.get(adapter, ()) if len(table.index)]
            if tables:
                scores, states = logits.index_select(0, rows).float(), x.index_select(0, rows).float()
                for table in tables:
                    table.add_logits(scores, states)
                logits.index_copy_(0, rows, scores.to(logits.dtype))

    def _groups(self, of: torch.Tensor) -> tuple[tuple[int, torch.Tensor], ...]:
        """Rows by adapter; `of` has a row each."""
        if self.scoring is None:
            return self.rows.groups
        return ((self.scoring, torch.arange(len(of), device=of.device)),) if self.scoring else ()

    def wrap_whole(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Around all that a head does: a soft cap would make minus infinity finite."""

        @functools.wraps(forward)
        def headed(lm_head: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
            logits: torch.Tensor | None = forward(lm_head, hidden_states, *args, **kwargs)
            if logits is not None:  # gathered elsewhere
                self.withhold(logits)
            return logits

        return headed

    def withhold(self, logits: torch.Tensor) -> None:
        """Make every reserved token that its row's delta has not added impossible: logits [s, V], in place."""
        tail, groups = logits[:, -self.reserved :], self._groups(logits)
        if not groups:
            tail.fill_(-torch.inf)
            return
        has = torch.zeros(len(logits), 1, dtype=torch.int64, device=logits.device)
        for adapter, rows in groups:
            has[rows] = self.added.get(adapter, 0)
        tail.masked_fill_(torch.arange(self.reserved, device=logits.device) >= has, -torch.inf)


def wrap_embedding(
    model: torch.nn.Module, rows: StepRows, forward_context: dict[str, Any]
) -> dict[str, DeltaEmbedding]:
    """Wrap the token embeddings of `model`; returns them by module name."""
    define_op(add_embedding, changes="output")
    wrapped = {}
    for name, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            embedding = DeltaEmbedding(module, rows, f"deltaworks.embedding.{name}")
            forward_context[embedding.key] = embedding
            module.forward = embedding.wrap(module.forward)
            wrapped[name] = embedding
    return wrapped


def wrap_head(model: torch.nn.Module, sampled: StepRows, reserved: int = 0) -> DeltaHead | None:
    """Wrap the head of `model`, which may be its token embedding; None when it has none, or tables in several places.

    Raises ReserveError where there is a reserve and no such head to withhold it.
    """
    processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    tables = [module for module in model.modules() if isinstance(module, ParallelLMHead)]
    tables = tables or [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    if len(processors) != 1 or len(tables) != 1:
        if reserved:
            raise ReserveError("the served model has no single head; set engine.reserved_tokens to 0")
        return None
    indices = tables[0].shard_indices
    head = DeltaHead((indices.org_vocab_start_index, indices.org_vocab_end_index), sampled, reserved)
    processors[0]._apply_head = head.wrap(processors[0]._apply_head)
    if reserved:
        processors[0].forward = head.wrap_whole(processors[0].forward)
    return head


def add_embedding(output: torch.Tensor, ids: torch.Tensor, name: str) -> None:
    """The op of compiled graphs; `name` is the embedding's key in vLLM's layer table."""
    embedding: DeltaEmbedding = get_forward_context().no_compile_layers[name]
    if embedding.rows.plan is not None:
        embedding.add(output, ids)
