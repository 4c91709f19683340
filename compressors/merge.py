"""Delta files of one base in, one delta file out: tensor by tensor (ImPart, arXiv 2504.13237, section 5).

| method | W = W_b + scale * ... | paper |
|---|---|---|
| ta | sum_t weight_t D_t | Task Arithmetic, arXiv 2212.04089 |
| ties | average of the trimmed entries that agree with the elected sign (ties.py) | arXiv 2306.01708 |

A file of Task Arithmetic means what its parts mean, to the rounding of fp32: factored records stay factored (join.py), and are
dense only where that is smaller or one of them is. TIES gives dense matrices. Either can be compressed anew.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from compressors.artifact import Artifact, Manifest, Merged, MergedPart, Ratios, version_for
from compressors.compress import Task, in_order, settings, store, stored_mask
from compressors.decompress import delta_tensor
from compressors.encode import encode_changed_rows, encode_dense
from compressors.errors import BudgetError
from compressors.execution import changed_rows
from compressors.fingerprint import stored_tensors
from compressors.join import Share, join_factors, scaled
from compressors.layout import is_projection
from compressors.mask_codes import code_of
from compressors.merge_inputs import checked, end_tokens, shape_of, tied_table, tokenizer, tokenizer_arrays
from compressors.methods import Config, encode_projection
from compressors.ratios import Tally
from compressors.record import Encoded
from compressors.tensors import one_thread_per_operation
from compressors.ties import ties
from compressors.writer import ArtifactWriter

DENSE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
ROWS_DTYPES = ("fp32", "fp16", "int8")
_MOST = 1e6  # of a weight: far beyond any use, and far below what fp32 cannot hold


@dataclass(frozen=True)
class MergeConfig:
    """How deltas become one. `weights`: one a file, or none for 1 each; `scale` is the papers' lambda.

    `retain` is TIES's share of kept entries (default: the middle of what ImPart's experiments search). `dense_dtype` is of dense
    matrices and `rows_dtype` of vocabulary tables: fp32 for Task Arithmetic and fp16 for TIES where they are None. `mask`: the
    code of Task Arithmetic's masks; the smaller one with "auto". `recompress`: settings of the method that compresses the merged
    projections anew; they bring their own rows_dtype and mask.
    """

    method: str = "ta"
    weights: tuple[float, ...] = ()
    scale: float = 1.0
    retain: float | None = None
    dense_dtype: str | None = None
    rows_dtype: str | None = None
    mask: str = "auto"
    recompress: Config | None = None

    def __post_init__(self) -> None:
        """Raises BudgetError naming the flag."""
        if self.method not in ("ta", "ties"):
            raise BudgetError(f"unknown --method {self.method!r}; one of ta, ties")
        for flag, numbers in (("--weights", self.weights), ("--scale", (self.scale,))):
            wrong = [number for number in numbers if not abs(number) <= _MOST]
            if wrong:
                raise BudgetError(f"{flag}: {wrong[0]} is not a number from {-_MOST:g} to {_MOST:g}")
        if self.retain is not None and self.method != "ties":
            raise BudgetError("--retain belongs to --method ties; Task Arithmetic keeps every entry")
        if self.retain is not None and not 0 < self.retain <= 1:
            raise BudgetError(f"--retain is the share of entries to keep, above 0 and at most 1; got {self.retain}")
        for flag, dtype, known in (
            ("--dense-dtype", self.dense_dtype, tuple(DENSE_BYTES)),
            ("--rows-dtype", self.rows_dtype, ROWS_DTYPES),
        ):
            if dtype is not None and dtype not in known:
                raise BudgetError(f"unknown {flag} {dtype!r}; one of {', '.join(known)}")
        self._check_mask()
        if self.recompress is not None and (self.dense_dtype or self.rows_dtype):
            raise BudgetError("with --compress the method's own settings say how values are stored; drop --dense-dtype")

    def _check_mask(self) -> None:
        if code_of(self.mask) is None and self.mask != "auto":
            raise BudgetError(
                f"--mask {self.mask}: no seed draws the entries that several deltas keep; take bitmask or gap8, or leave it out"
            )
        if self.mask != "auto" and (self.method != "ta" or self.recompress is not None):
            raise BudgetError(
                f"--mask {self.mask} belongs to --method ta without --compress: TIES gives dense matrices"
            )

    def weights_of(self, count: int) -> tuple[float, ...]:
        """One weight a file. Raises BudgetError."""
        if self.weights and len(self.weights) != count:
            raise BudgetError(
                f"--weights has {len(self.weights)} numbers for {count} deltas; give one for each file, in their order, "
                "or leave it out for 1 each"
            )
        return self.weights or (1.0,) * count

    @property
    def share(self) -> float:
        """What TIES keeps."""
        return 0.6 if self.retain is None else self.retain

    @property
    def dense(self) -> str:
        return self.dense_dtype or ("fp32" if self.method == "ta" else "fp16")

    @property
    def rows(self) -> str:
        if self.recompress is not None:
            return self.recompress.rows_dtype
        return self.rows_dtype or ("fp32" if self.method == "ta" else "fp16")


def merge(
    paths: Sequence[Path],
    base: Path,
    out: Path,
    config: MergeConfig,
    tokenizer_of: Path | None = None,
    progress: bool = False,
) -> Manifest:
    """Merge the delta files `paths`, all of `base`, into the file `out`, which is whole or absent.

    `tokenizer_of`: the one of them whose chat template and end tokens are taken where they disagree. Every input is verified
    first. Raises BudgetError, BaseMismatchError, ArtifactError, CheckpointError naming the file or the flag.
    """
    weights = config.weights_of(len(paths))
    reports = checked(paths, base, out)
    manifests = [report.manifest for report in reports]
    told = tokenizer(paths, manifests, end_tokens(base), tokenizer_of)
    with ExitStack() as stack:
        shares = [
            Share(stack.enter_context(Artifact.open(path)), weight * (config.scale if config.method == "ta" else 1))
            for path, weight in zip(paths, weights, strict=True)
        ]
        stored = {name: tensor.shape for name, tensor in stored_tensors(base).items()}
        tasks = _tasks(shares, config, manifests[0].seed, stored)
        writer = stack.enter_context(ArtifactWriter(out))
        records, tally = {}, Tally()
        with one_thread_per_operation() as workers:
            done = in_order(tasks, workers)
            for (encoded,) in tqdm(done, "merging", total=len(tasks), unit="tensor", disable=not progress):
                records[encoded.name] = store(writer, encoded)
                tally.add(encoded.name, encoded.shape, encoded.tied_to is not None, encoded.arrays)
        for key, array in tokenizer_arrays(told, [share.artifact for share in shares]).items():
            writer.add(key, array)
        recompress = config.recompress
        own = settings(recompress)
        manifest = Manifest(
            format_version=version_for(told),
            method=config.method if recompress is None else recompress.method,
            base_fingerprint=manifests[0].base_fingerprint,
            base_name=manifests[0].base_name,
            architecture=manifests[0].architecture,
            mask=stored_mask(recompress),
            **(own | {"seed": manifests[0].seed if recompress is None else own["seed"]}),
            ratios=Ratios(values=tally.values_ratio, projection_bytes=tally.bytes_ratio, whole_file=None),
            tokenizer=told,
            tool=f"deltaworks {importlib.metadata.version('deltaworks')}",
            merged=Merged(
                method="ta" if config.method == "ta" else "ties",
                scale=config.scale,
                retain=config.share if config.method == "ties" else None,
                parts=tuple(
                    MergedPart(sha256=report.digest, weight=weight)
                    for report, weight in zip(reports, weights, strict=True)
                ),
            ),
            tensors=records,
        )
        return writer.finish(manifest, tally.dense_bytes)


def _tasks(shares: Sequence[Share], config: MergeConfig, seed: int, stored: dict[str, tuple[int, ...]]) -> list[Task]:
    """One task per record that any of the files has. Raises ArtifactError where their shapes or ties disagree."""
    names = sorted({name for share in shares for name in share.artifact.records})
    tasks: list[Task] = []
    for name in names:
        artifacts = [share.artifact for share in shares]
        shape = shape_of(name, artifacts)
        if table := tied_table(name, artifacts):
            tasks.append(partial(_tied, name, shape, table))
            continue
        changing = [share for share in shares if _changes(share, name)]
        tasks.append(partial(_task, name, shape, changing, config, seed))
    return tasks


def _tied(name: str, shape: tuple[int, ...], table: str) -> list[Encoded]:
    return [Encoded(name, "zero", shape, tied_to=table)]


def _task(name: str, shape: tuple[int, ...], shares: Sequence[Share], config: MergeConfig, seed: int) -> list[Encoded]:
    return [_merged(name, shape, shares, config, seed)]


def _changes(share: Share, name: str) -> bool:
    record = share.artifact.records.get(name)
    return record is not None and record.kind != "zero" and share.weight != 0


def _merged(name: str, shape: tuple[int, ...], shares: Sequence[Share], config: MergeConfig, seed: int) -> Encoded:
    if not shares:
        return Encoded(name, "zero", shape)
    if all(share.artifact.records[name].kind == "rows" for share in shares):
        return _rows(name, shape, shares, config)
    matrix = "#" in name or is_projection(name, len(shape))
    if config.recompress is not None and matrix:
        return encode_projection(name, _sum(name, shares, config), [config.recompress])[0]
    if not matrix:  # norms and biases are small: they lose nothing
        return encode_dense(name, _sum(name, shares, config), "fp32")
    return (_factored(name, shape, shares, config, seed) if config.method == "ta" else None) or encode_dense(
        name, _sum(name, shares, config), config.dense
    )


def _factored(
    name: str, shape: tuple[int, ...], shares: Sequence[Share], config: MergeConfig, seed: int
) -> Encoded | None:
    """The weighted sum as factors; None where one of the records is a dense matrix, or factors would be larger than one."""
    if len(shares) == 1 and (alone := scaled(name, shares[0], seed, code_of(config.mask))):
        return alone
    if any(share.artifact.records[name].kind == "raw" for share in shares):
        return None
    joined = join_factors(name, shares, code_of(config.mask))
    return joined if joined.nbytes < DENSE_BYTES[config.dense] * math.prod(shape) else None


def _sum(name: str, shares: Sequence[Share], config: MergeConfig) -> torch.Tensor:
    """The merged delta of one tensor, dense, fp32."""

    def deltas() -> Iterator[tuple[torch.Tensor, float]]:
        for share in shares:
            yield delta_tensor(share.artifact, name), share.weight

    if config.method == "ties":
        return config.scale * ties(deltas, config.share, math.prod(shares[0].artifact.records[name].shape))
    total = torch.zeros(())
    for delta, weight in deltas():
        total = total + weight * delta
    return total


def _rows(name: str, shape: tuple[int, ...], shares: Sequence[Share], config: MergeConfig) -> Encoded:
    """A vocabulary table: the rows that any delta changes. Rows of added tokens are summed as changes of zero."""
    found = {id(share): changed_rows(share.artifact, name) for share in shares}
    every = np.concatenate([index for index, _, _ in found.values()])
    union = np.unique(every)
    scales = [scale for _, _, scale in found.values()]
    apart = len(union) == len(every) and all(scale is not None for scale in scales)
    if apart and config.method == "ta" and config.rows != "fp16":  # integers stay integers
        order = np.argsort(every)
        steps = [share.weight * scale for share, scale in zip(shares, scales, strict=True) if scale is not None]
        values = np.concatenate([stored for _, stored, _ in found.values()])[order]
        arrays = {"row_idx": union.astype(np.int32), "row_delta": values}
        return Encoded(name, "rows", shape, arrays | {"row_scale": np.concatenate(steps)[order].astype(np.float32)})

    def deltas() -> Iterator[tuple[torch.Tensor, float]]:
        for share in shares:
            index, stored, scale = found[id(share)]
            values = stored.astype(np.float32)
            table = torch.zeros(len(union), *shape[1:])
            table[np.searchsorted(union, index)] = torch.from_numpy(
                values if scale is None else values * scale[:, None]
            )
            yield table, share.weight

    if config.method == "ties":
        total = config.scale * ties(deltas, config.share, math.prod(shape))
    else:
        total = torch.zeros(())
        for table, weight in deltas():
            total = total + weight * table
    return encode_changed_rows(name, shape, torch.from_numpy(union), total, config.rows)
