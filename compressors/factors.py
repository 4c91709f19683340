"""A projection's record as columns of kept entries, whatever its kind, mask and width: the one reading that serving and
decompressing share. No torch.

Legend: m out features, n in features, r rank, k column. The delta is sum_k coef[k] * U[:, k] V[:, k]^T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compressors.artifact import Array, Record, Source
from compressors.errors import ArtifactError
from compressors.mask_codes import CODES, Code, decode_mask
from compressors.masks import factor_rows, layer_seed
from compressors.packing import packed_size, unpack

FACTORED = ("impart", "lowrank", "sparse", "signs", "raw")  # kinds that have factors; of raw ones, matrices

# (layer_seed, factor 0=U 1=V, rows of the factor, keep per column) -> kept rows, column after column
MaskSource = Callable[[int, int, int, npt.NDArray[np.int32]], npt.NDArray[np.int32]]


@dataclass(frozen=True)
class Columns:
    """One factor: rows and values column after column. `bf16_exact`: bf16 holds every value as it is."""

    start: npt.NDArray[np.int64]  # [r + 1]
    rows: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    bf16_exact: bool

    def within(self, low: int, high: int) -> Columns:
        """The entries whose row lies in [low, high), renumbered from 0."""
        inside = (self.rows >= low) & (self.rows < high)
        if inside.all():
            return self if low == 0 else Columns(self.start, self.rows - low, self.values, self.bf16_exact)
        before = np.concatenate([[0], np.cumsum(inside)])
        return Columns(before[self.start], self.rows[inside] - low, self.values[inside], self.bf16_exact)

    def dense(self, num_rows: int) -> npt.NDArray[np.float32]:
        """As a matrix [num_rows, r]."""
        matrix = np.zeros((num_rows, len(self.start) - 1), dtype=np.float32)
        matrix[self.rows, np.repeat(np.arange(matrix.shape[1]), np.diff(self.start))] = self.values
        return matrix


@dataclass(frozen=True)
class Factors:
    """U [m, r], V [n, r] and coef [r]."""

    u: Columns
    v: Columns
    coef: npt.NDArray[np.float32]


def read_factors(artifact: Source, name: str, masks: MaskSource = factor_rows) -> Factors:
    """The factors of the record `name`. Raises ArtifactError for a kind without factors or arrays that contradict it."""
    record = artifact.records[name]
    if record.kind == "impart":
        return _impart(artifact, name, record, masks)
    if record.kind == "lowrank":
        return _lowrank(artifact, name)
    if record.kind == "sparse":
        return _sparse(artifact, name, record, masks)
    if record.kind == "signs":
        return _signs(artifact, name, record)
    if record.kind == "raw" and len(record.shape) == 2:
        return _raw(artifact, name, record)
    raise ArtifactError(f"{name} is stored as {record.kind!r}, which has no factors; one of {', '.join(FACTORED)} has")


def spread(count: int, columns: int) -> npt.NDArray[np.int32]:
    """`count` kept entries over columns as evenly as whole numbers allow: i32 [columns]."""
    return np.diff(np.arange(columns + 1, dtype=np.int64) * count // columns).astype(np.int32)


def read_values(
    artifact: Source, name: str, label: str, record: Record, keep: npt.NDArray[np.integer]
) -> tuple[npt.NDArray[np.float32], bool]:
    """Values of one factor as fp32, and whether bf16 holds each of them exactly."""
    key = f"{name}::{label}"
    stored = artifact.array(key)
    if not record.bits:
        return decoded(stored, artifact.slots[key].dtype)
    if sum(columns for columns, _ in record.bits) != len(keep):
        raise ArtifactError(f"{name}: bits {record.bits} do not cover its {len(keep)} columns")
    values, column, byte = [], 0, 0
    for columns, width in record.bits:
        count = int(keep[column : column + columns].sum(dtype=np.int64))
        size = packed_size(count, width)
        try:
            values.append(unpack(stored[byte : byte + size], count, width))
        except ArtifactError as error:
            raise ArtifactError(f"{key}: {error}") from None
        column, byte = column + columns, byte + size
    if byte != len(stored):
        raise ArtifactError(f"{key} has {len(stored)} bytes, its columns need {byte}")
    return np.concatenate(values).astype(np.float32), True


def read_rows(
    artifact: Source,
    name: str,
    side: int,
    record: Record,
    keep: npt.NDArray[np.int32],
    masks: MaskSource = factor_rows,
) -> npt.NDArray[np.int32]:
    """Kept rows of one factor (side 0 = U, 1 = V), column after column."""
    num_rows = record.shape[side]
    code: str = record.mask or artifact.mask
    if code == "seeded":
        return masks(layer_seed(artifact.seed, name), side, num_rows, keep)
    known: Code | None = next((one for one in CODES if one == code), None)
    if known is None:
        raise ArtifactError(f"{name}: mask {code!r} is unknown; one of seeded, {', '.join(CODES)}")
    key = f"{name}::mask_{'uv'[side]}"
    try:
        return decode_mask(known, artifact.array(key), keep, num_rows)
    except ArtifactError as error:
        raise ArtifactError(f"{key}: {error}") from None


def _impart(artifact: Source, name: str, record: Record, masks: MaskSource) -> Factors:
    sides = []
    for side, label in enumerate("uv"):
        keep = artifact.array(f"{name}::keep_{label}").astype(np.int32)
        values, exact = read_values(artifact, name, f"{label}_vals", record, keep)
        rows = read_rows(artifact, name, side, record, keep, masks)
        sides.append(Columns(_starts(keep), rows.astype(np.int64), values, exact))
    return Factors(sides[0], sides[1], artifact.array(f"{name}::coef"))


def _lowrank(artifact: Source, name: str) -> Factors:
    columns = []
    for key in (f"{name}::b", f"{name}::a"):  # [m, r], [r, n]
        stored, dtype = artifact.array(key), artifact.slots[key].dtype
        matrix = np.ascontiguousarray(stored.T) if key.endswith("b") else stored
        values, exact = decoded(matrix.reshape(-1), dtype)
        rank, height = matrix.shape
        columns.append(
            Columns(np.arange(rank + 1, dtype=np.int64) * height, np.tile(np.arange(height), rank), values, exact)
        )
    return Factors(columns[0], columns[1], np.ones(len(columns[0].start) - 1, dtype=np.float32))


def _sparse(artifact: Source, name: str, record: Record, masks: MaskSource) -> Factors:
    """Entries of the delta itself: U is the delta, V the identity."""
    columns = record.shape[1]
    keep = spread(int(artifact.array(f"{name}::count")[0]), columns)
    values, exact = read_values(artifact, name, "vals", record, keep)
    rows = read_rows(artifact, name, 0, record, keep, masks)
    coef = np.full(columns, artifact.array(f"{name}::scale")[0], dtype=np.float32)
    return Factors(Columns(_starts(keep), rows.astype(np.int64), values, exact), _identity(columns), coef)


def _signs(artifact: Source, name: str, record: Record) -> Factors:
    """A sign for every entry, and one scale (U is the signs, V the identity) or one a row (U the identity, V the signs)."""
    rows, columns = record.shape
    packed = artifact.array(f"{name}::signs")
    positive = np.unpackbits(packed, count=rows * columns, bitorder="little").reshape(rows, columns)
    signs = np.where(positive, np.float32(1), np.float32(-1))
    scale = artifact.array(f"{name}::scale")
    if len(scale) > 1:
        start = np.arange(rows + 1, dtype=np.int64) * columns
        return Factors(
            _identity(rows), Columns(start, np.tile(np.arange(columns), rows), signs.reshape(-1), True), scale
        )
    start = np.arange(columns + 1, dtype=np.int64) * rows
    u = Columns(start, np.tile(np.arange(rows), columns), np.ascontiguousarray(signs.T).reshape(-1), True)
    return Factors(u, _identity(columns), np.full(columns, scale[0], dtype=np.float32))


def _raw(artifact: Source, name: str, record: Record) -> Factors:
    """A dense delta is itself times the identity."""
    key, (rows, columns) = f"{name}::delta", record.shape
    values, exact = decoded(np.ascontiguousarray(artifact.array(key).T).reshape(-1), artifact.slots[key].dtype)
    start = np.arange(columns + 1, dtype=np.int64) * rows
    u = Columns(start, np.tile(np.arange(rows), columns), values, exact)
    return Factors(u, _identity(columns), np.ones(columns, dtype=np.float32))


def _identity(count: int) -> Columns:
    return Columns(np.arange(count + 1), np.arange(count), np.ones(count, dtype=np.float32), True)


def _starts(keep: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(keep, dtype=np.int64)])


def decoded(stored: Array, dtype: str) -> tuple[npt.NDArray[np.float32], bool]:
    """Stored values of a slot's dtype as fp32, and whether bf16 holds each of them exactly."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32), True
    return stored.astype(np.float32), dtype == "I8"
