"""Everything that a fine-tune changes outside its linear projections, on one worker: embedding, head, norms, biases.

The manager asks `prepare` for every record that is no projection (nothing is changed yet, so a refusal leaves no trace), then
`install`. Per step it reports two plans: of the token rows, and of the sampled rows, which alone have logits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from compressors.artifact import Artifact
from compressors.execution import changed_rows, raw_delta
from compressors.layout import HEAD, input_table, is_embedding
from server.engine.worker.biases import DeltaBias, wrap_biases
from server.engine.worker.norms import DeltaNorm, wrap_norms
from server.engine.worker.placement import Placement, PlacementError
from server.engine.worker.plan import Planner, StepPlan
from server.engine.worker.rows import StepRows
from server.engine.worker.vocabulary import RowTable, wrap_embedding, wrap_head


@dataclass
class Prepared:
    """The changes of one delta outside its projections, by module name."""

    embeddings: dict[str, tuple[RowTable, ...]] = field(default_factory=dict)
    head: tuple[RowTable, ...] = ()
    shared_tables: bool = False  # they belong to the parts of a combination
    added_tokens: int = 0
    norms: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes in memory; a tied table counts once."""
        found = () if self.shared_tables else (*self.embeddings.values(), self.head)
        tables = {id(table.values): table.nbytes for tables in found for table in tables}
        vectors = [vector for vectors in self.norms.values() for vector in vectors.values()]
        return sum(tables.values()) + sum(vector.nbytes for vector in (*vectors, *self.biases.values()))


class OutsidePlane:
    """The layers of one worker outside its projections, wrapped once, before the first forward."""

    def __init__(
        self,
        model: torch.nn.Module,
        placement: Placement,
        context: dict[str, Any],
        device: torch.device,
        reserved_tokens: int = 0,
    ) -> None:
        """Raises ReserveError."""
        self._placement = placement
        self._reserved = reserved_tokens
        self._device = device
        self._tokens, self._sampled = StepRows(device), StepRows(device)
        self._planner = Planner()
        self._norms: dict[str, DeltaNorm] = wrap_norms(model, self._tokens, context)
        self._biases: dict[str, DeltaBias] = wrap_biases(model, self._tokens, context)
        self._embeddings = wrap_embedding(model, self._tokens, context)
        self._head = wrap_head(model, self._sampled, reserved_tokens)

    # Deltas

    def prepare(self, artifact: Artifact) -> Prepared:
        """What the artifact changes outside its projections, on the device. Raises PlacementError naming the parameter."""
        prepared = Prepared()
        for name, record in artifact.records.items():
            if record.kind == "rows":
                self._table(prepared, artifact, name)
            elif record.kind == "raw" and len(record.shape) == 1:
                self._vector(prepared, name, torch.from_numpy(raw_delta(artifact, name)))
        return prepared

    def combine(self, parts: Sequence[tuple[int, float]]) -> Prepared:
        """The weighted sum of resident deltas (adapter id, weight) outside their projections."""

        def tables(resident: Mapping[int, tuple[RowTable, ...]]) -> tuple[RowTable, ...]:
            held = [(table, weight) for part, weight in parts for table in resident.get(part, ())]
            return tuple(replace(table, weight=weight * table.weight) for table, weight in held)

        prepared = Prepared(shared_tables=True)
        prepared.embeddings = {
            name: found for name, layer in self._embeddings.items() if (found := tables(layer.resident))
        }
        if self._head is not None:
            prepared.head = tables(self._head.resident)
            prepared.added_tokens = max(self._head.added.get(part, 0) for part, _ in parts)
        prepared.norms = {name: vectors for name, norm in self._norms.items() if (vectors := norm.combine(parts))}
        for name, bias in self._biases.items():
            held = [weight * bias.resident[part] for part, weight in parts if part in bias.resident]
            if held:
                prepared.biases[name] = torch.stack(held).sum(0)
        return prepared

    def install(self, adapter: int, prepared: Prepared) -> None:
        for name, tables in prepared.embeddings.items():
            self._embeddings[name].resident[adapter] = tables
        if self._head is not None and prepared.head:
            self._head.resident[adapter] = prepared.head
            self._head.added[adapter] = prepared.added_tokens
        for name, vectors in prepared.norms.items():
            self._norms[name].resident[adapter] = vectors
        for name, change in prepared.biases.items():
            self._biases[name].resident[adapter] = change

    def remove(self, adapter: int) -> None:
        heads = () if self._head is None else (self._head,)
        for head in heads:
            head.added.pop(adapter, None)
        for layer in (*self._embeddings.values(), *heads, *self._norms.values(), *self._biases.values()):
            layer.resident.pop(adapter, None)

    # Each step

    def begin(self, plan: StepPlan | None, sampled: Sequence[int]) -> None:
        """`plan` of the token rows, and the adapter id of every sampled row."""
        self._tokens.begin(plan)
        self._sampled.begin(self._planner.plan(sampled))

    @contextmanager
    def scoring(self, adapter: int) -> Iterator[None]:
        """Inside the block the head is given rows of one prompt to `adapter`, 0 for the base, instead of sampled rows."""
        if self._head is None:
            yield
            return
        self._head.scoring = adapter
        try:
            yield
        finally:
            self._head.scoring = None

    def forget(self) -> None:
        """A delta was loaded or dropped: what layers derived from the last plans is stale."""
        self._planner.forget()
        self._tokens.begin(None)
        self._sampled.begin(None)
        for norm in self._norms.values():
            norm.forget()

    # Where a record belongs

    def _table(self, prepared: Prepared, artifact: Artifact, name: str) -> None:
        record = artifact.records[name]
        index, values, scale = changed_rows(artifact, name)
        table = RowTable(
            torch.from_numpy(index).to(self._device),
            torch.from_numpy(values).to(self._device),
            None if scale is None else torch.from_numpy(scale).to(self._device),
        )
        module = self._placement.module_name(name)
        embedding = self._embeddings.get(module)
        if name != HEAD and embedding is None:
            raise PlacementError(f"{name}: the served model has no token embedding of this name")
        if embedding is not None:
            prepared.added_tokens = self._added(name, record.shape[0], embedding.module.org_vocab_size)
            prepared.embeddings[module] = (table,)
        if name == HEAD or (name == input_table(artifact.records) and _ties_head(artifact)):
            if self._head is None:
                raise PlacementError(f"{name}: the served model has no single head that could change")
            prepared.head = (table.within(*self._head.shard),)

    def _added(self, name: str, rows: int, served: int) -> int:
        """How many tokens a table of so many rows adds to the base's; `served` counts the reserve. Raises PlacementError."""
        added = rows - (served - self._reserved)
        if added > self._reserved:
            raise PlacementError(
                f"{name}: the fine-tune adds {added} tokens to the vocabulary, and engine.reserved_tokens is {self._reserved}: it "
                f"must be at least {added}"
            )
        return max(0, added)

    def _vector(self, prepared: Prepared, name: str, delta: torch.Tensor) -> None:
        module = self._placement.module_name(name)
        leaf = name.rpartition(".")[2]
        if (norm := self._norms.get(module)) is not None:
            prepared.norms.setdefault(module, {})[leaf] = norm.prepare(leaf, delta)
            return
        if leaf != "bias":
            raise PlacementError(f"{name}: the served model has no norm or bias of this name")
        place = self._placement.place(name.removesuffix("bias") + "weight", (len(delta), sys.maxsize))
        if place.linear not in self._biases:
            raise PlacementError(f"{name}: the served layer {place.linear} has no bias")
        shard = place.shard
        prepared.biases[place.linear] = self._biases[place.linear].prepare(
            prepared.biases.get(place.linear), delta, *shard.out_range, shard.out_offset
        )


def _ties_head(artifact: Artifact) -> bool:
    """A head without a record of its own, or with one that points to the table, repeats it."""
    record = artifact.records.get(HEAD)
    return record is None or (record.tied_to is not None and is_embedding(record.tied_to))
