"""Base and fine-tune folders in, one delta file out: parameter by parameter, with one matrix in memory at a time.

Same inputs give the same bytes on the same build of torch and number of threads; across builds the SVD may differ in the last bit.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from compressors.artifact import Array, Kind, Manifest, Ratios, Record, TokenizerInfo
from compressors.errors import CheckpointError
from compressors.fingerprint import fingerprint
from compressors.impart import ImPartConfig, budget_columns, decompose, drop_ratios, sparsify
from compressors.layout import Part, is_buffer, is_embedding, projection_parts
from compressors.ratios import Tally
from compressors.tensors import Checkpoint
from compressors.writer import ArtifactWriter

_HEAD = "lm_head.weight"


def compress(
    base: Path, fine_tune: Path, out: Path, config: ImPartConfig, name: str | None = None, progress: bool = False
) -> Manifest:
    """Compress `fine_tune` - `base` into the file `out`. Raises CheckpointError, BudgetError; `out` is whole or absent.

    `name` is written into the manifest as the base's name, for people; identity is the fingerprint.
    """
    with Checkpoint(base) as old, Checkpoint(fine_tune) as new, ArtifactWriter(out) as writer:
        names = _matched_names(old, new)
        job = _Job(old, new, writer, config)
        for parameter in tqdm(names, desc="compressing", unit="tensor", disable=not progress):
            job.add(parameter)
        manifest = Manifest(
            method="impart",
            base_fingerprint=fingerprint(base),
            base_name=name or base.name,
            architecture=str(next(iter(new.config.get("architectures") or []), "unknown")),
            ratio=config.ratio,
            beta=config.beta,
            c=config.c,
            rule=config.rule,
            rescale=config.rescale,
            value_dtype=config.value_dtype,
            mask="seeded",
            seed=config.seed,
            ratios=Ratios(values=job.tally.values_ratio, projection_bytes=job.tally.bytes_ratio, whole_file=None),
            tokenizer=_tokenizer_info(new),
            tool=f"deltaworks {importlib.metadata.version('deltaworks')}",
            tensors=job.records,
        )
        return writer.finish(manifest, job.tally.dense_bytes)


class _Job:
    """One compression under way: what is stored so far, and what it cost."""

    def __init__(self, old: Checkpoint, new: Checkpoint, writer: ArtifactWriter, config: ImPartConfig) -> None:
        self.old, self.new, self.writer, self.config = old, new, writer, config
        self.records: dict[str, Record] = {}
        self.tally = Tally()

    def add(self, name: str) -> None:
        """Store one parameter of the checkpoint, as whatever kind fits it."""
        before, after = self._pair(name)
        if tied_to := self._tied_to(name):
            self.records[name] = Record(kind="zero", shape=tuple(after.shape), tied_to=tied_to)
            return
        self.tally.dense_bytes += 2 * after.numel()
        parts = projection_parts(name, tuple(after.shape), self.new.config)
        for part in parts:
            self._projection(part, part.view(after) - part.view(before))
        if not parts and is_embedding(name):
            self._rows(name, before, after)
        elif not parts:
            self._raw(name, after - before)

    def _pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        after = self.new.floats(name)
        before = self.old.floats(name if name in self.old.tensors else self._embedding_name())
        if before.shape[1:] != after.shape[1:] or (before.shape != after.shape and not is_embedding(name)):
            raise CheckpointError(
                f"{name} has shape {list(after.shape)} in the fine-tune and {list(before.shape)} in the base; is this its base?"
            )
        if before.shape[0] > after.shape[0]:
            raise CheckpointError(
                f"{name} has fewer rows in the fine-tune than in the base; a smaller vocabulary is not supported"
            )
        return before, after

    def _tied_to(self, name: str) -> str | None:
        """The embedding that a stored head repeats, where the base does not store the head."""
        if name != _HEAD or name in self.old.tensors:
            return None
        embedding = self._embedding_name()
        if torch.equal(self.new.tensor(name), self.new.tensor(embedding)):
            return embedding
        raise CheckpointError(
            f"{name} differs from {embedding} in the fine-tune, but the base ties the two; untie the base first"
        )

    def _embedding_name(self) -> str:
        return next(name for name in self.new.names if is_embedding(name) and name != _HEAD)

    def _projection(self, part: Part, delta: torch.Tensor) -> None:
        self.tally.projection_values += delta.numel()
        if not delta.any():
            self.records[part.name] = Record(kind="zero", shape=part.shape)
            return
        config = self.config
        spectrum = decompose(delta)
        rank, rule = spectrum.true_rank, config.rule_for(part.name)
        if rank <= budget_columns(part.shape, config.ratio, rule):
            self._lowrank(part, spectrum.u[:, :rank] * spectrum.s[:rank], spectrum.vt)
            return
        drops = drop_ratios(spectrum.s[:rank], part.shape, config.ratio, config.beta, config.c, rule)
        factors = sparsify(spectrum, drops, part.name, config.seed, config.value_dtype, config.rescale)
        arrays = {
            "coef": factors.coef,
            "keep_u": factors.keep_u,
            "keep_v": factors.keep_v,
            "u_vals": factors.u_vals,
            "v_vals": factors.v_vals,
        }
        if sum(array.nbytes for array in arrays.values()) >= 2 * delta.numel():  # a layer smaller than its book-keeping
            self.tally.kept_values += delta.numel()
            self._raw(part.name, delta, projection=True)
            return
        self.tally.kept_values += len(factors.u_vals) + len(factors.v_vals)
        self._store(part.name, "impart", part.shape, arrays, rank=len(factors.coef), projection=True)

    def _lowrank(self, part: Part, scaled_u: torch.Tensor, vt: torch.Tensor) -> None:
        """The delta's rank fits the budget as it is: keep it whole, in fp32."""
        rank = scaled_u.shape[1]
        arrays = {"a": vt[:rank].contiguous().numpy(), "b": scaled_u.contiguous().numpy()}
        self.tally.kept_values += sum(array.size for array in arrays.values())
        self._store(part.name, "lowrank", part.shape, arrays, rank=rank, projection=True)

    def _rows(self, name: str, before: torch.Tensor, after: torch.Tensor) -> None:
        """Changed rows of a vocabulary table as deltas, added rows whole."""
        known = before.shape[0]
        changed = torch.ones(after.shape[0], dtype=torch.bool)
        changed[:known] = (after[:known] != before).any(1)
        index = changed.nonzero()[:, 0]
        if not len(index):
            self.records[name] = Record(kind="zero", shape=tuple(after.shape))
            return
        rows = after[index]
        rows[index < known] -= before[index[index < known]]
        arrays = {"row_idx": index.numpy().astype(np.int32), "row_delta": _half(rows)}
        self._store(name, "rows", tuple(after.shape), arrays)

    def _raw(self, name: str, delta: torch.Tensor, projection: bool = False) -> None:
        if not delta.any():
            self.records[name] = Record(kind="zero", shape=tuple(delta.shape))
            return
        array = _half(delta) if projection else delta.contiguous().numpy()
        self._store(name, "raw", tuple(delta.shape), {"delta": array}, projection=projection)

    def _store(
        self,
        name: str,
        kind: Kind,
        shape: tuple[int, ...],
        arrays: dict[str, Array],
        rank: int = 0,
        projection: bool = False,
    ) -> None:
        digests = {}
        for key, array in arrays.items():
            digests[key] = self.writer.add(f"{name}::{key}", array, bf16=array.dtype == np.uint16)
            self.tally.projection_bytes += array.nbytes if projection else 0
        self.records[name] = Record(kind=kind, shape=shape, rank=rank, sha256=digests)


def _half(values: torch.Tensor) -> Array:
    """fp16 where it holds the values, else fp32."""
    half = values.half()
    return (half if torch.isfinite(half).all() else values).contiguous().numpy()


def _matched_names(old: Checkpoint, new: Checkpoint) -> list[str]:
    """Names of all parameters, the same in base and fine-tune except for a tied head. Raises CheckpointError."""
    ours = {name for name in old.names if not is_buffer(name)}
    theirs = {name for name in new.names if not is_buffer(name)}
    missing = ours - theirs - ({_HEAD} if new.config.get("tie_word_embeddings") else set())
    if missing:
        raise CheckpointError(
            f"the fine-tune {new.folder.name} lacks {min(missing)} (and {len(missing) - 1} more tensors of the base)"
        )
    unknown = theirs - ours - {_HEAD}
    if unknown:
        raise CheckpointError(
            f"the fine-tune {new.folder.name} has {min(unknown)}, which its base lacks ({len(unknown)} such tensors)"
        )
    if _HEAD in theirs - ours and not any(is_embedding(name) and name != _HEAD for name in ours):
        raise CheckpointError(f"the fine-tune {new.folder.name} has {_HEAD}, which its base lacks")
    return sorted(theirs)


def _tokenizer_info(new: Checkpoint) -> TokenizerInfo:
    template = new.folder / "chat_template.jinja"
    text: Any = template.read_text(encoding="utf-8") if template.is_file() else new.tokenizer().get("chat_template")
    return TokenizerInfo(
        vocab_size=new.config.get("vocab_size"),
        eos_token_id=new.config.get("eos_token_id"),
        chat_template_sha256=hashlib.sha256(text.encode()).hexdigest() if isinstance(text, str) else None,
    )
