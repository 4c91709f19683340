"""ctypes view of the C++ kernel: factors of a delta in, additions to a linear's output out."""

from __future__ import annotations

import ctypes
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from compressors.execution import SparseFactor
from compressors.kernels.build import KernelUnavailableError, library
from compressors.kernels.choice import ALWAYS, Choice, choose
from compressors.kernels.forms import DENSE, INDEX16, INDEX32, KINDS, MASK, PAD, PackedFactor, Side, pack_factor

LEVELS = ("portable", "avx2", "avx512")
_INT32, _INT64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
# torch compiles a product for every new shape, in almost a millisecond: prompts of any length and all ranks come in a few shapes.
_RANKS, _BLOCKS = 32, (512, 128)
_REMEMBERED = 64  # arrays of row numbers


class SideStruct(ctypes.Structure):
    """`dw_side`: V or U of one factor."""

    _fields_ = (("values", _POINTER), ("index", _POINTER), ("columns", _POINTER))


class FactorStruct(ctypes.Structure):
    """`dw_factor`: one delta on one part of a linear."""

    _fields_ = (
        ("rank", _INT32),
        ("out_features", _INT32),
        ("in_features", _INT32),
        ("out_offset", _INT32),
        ("kind", _INT32),
        ("few_rows", _INT32),
        ("identity_u", _INT32),
        ("reserved", _INT32),
        ("entries", _INT64),
        ("coef", _POINTER),
        ("v", SideStruct),
        ("u", SideStruct),
    )


_SIGNATURES = {
    "dw_apply": (None, (_POINTER, _INT64, _POINTER, _INT64, _POINTER, _INT64, _INT32, _INT32, _INT32)),
    "dw_best_level": (_INT32, ()),
    "dw_share_team": (None, (_POINTER,)),
    "dw_all_int8": (_INT32, (_POINTER, _INT32, _INT64)),
    "dw_pack": (None, (_POINTER, _INT32, _POINTER, _INT64, _INT32, _POINTER, _POINTER, _POINTER)),
    "dw_dense": (None, (_POINTER, _INT32, _POINTER, _INT32, _INT32)),
    "dw_kept_rows": (None, (_POINTER, _POINTER, _INT64, _INT64, _POINTER)),
}


@dataclass(frozen=True)
class NativeKernel:
    """The loaded library. Pointers are raw addresses; the caller keeps the memory behind them alive."""

    library: ctypes.CDLL
    level: int  # the best of LEVELS on this CPU

    @classmethod
    def load(cls, path: Path | None = None) -> NativeKernel:
        """The library of this machine, or the one at `path`. Raises KernelUnavailableError when it cannot be built or loaded."""
        path = path or library()
        try:
            handle = ctypes.CDLL(str(path))  # a call releases the GIL
        except OSError as error:
            raise KernelUnavailableError(f"{path} does not load: {error}") from error
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(handle, name)
            function.restype, function.argtypes = result, arguments
        handle.dw_share_team(_openmp_entry())
        return cls(handle, handle.dw_best_level())

    def kept_rows(
        self, keys: npt.NDArray[np.uint64], keep: npt.NDArray[np.int32], num_rows: int
    ) -> npt.NDArray[np.int32]:
        """Seeded masks of one factor, all columns: the same rows as `compressors.masks.factor_rows`."""
        keys = np.ascontiguousarray(keys, dtype=np.uint64)
        keep = np.ascontiguousarray(keep, dtype=np.int32)
        rows = np.empty(int(keep.sum(dtype=np.int64)), dtype=np.int32)
        self.library.dw_kept_rows(keys.ctypes.data, keep.ctypes.data, len(keep), num_rows, rows.ctypes.data)
        return rows


def _openmp_entry() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch uses (GNU's, LLVM's and Intel's all have it); None without one.

    A preloaded runtime comes first, as it does for torch itself.
    """
    for path in (None, Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"):
        try:
            entry = ctypes.CDLL(None if path is None else str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(entry, ctypes.c_void_p).value
    return None


@dataclass(frozen=True)
class NativeFactors:
    """All parts of one linear for one delta, with the memory that the structs point into."""

    structs: ctypes.Array[FactorStruct]
    factors: tuple[PackedFactor, ...]  # those that torch multiplies from the fewest rows on come last
    dense_rows: tuple[int, ...]  # of each: the rows from which torch does
    shared: bool = False  # all but the coefficients belongs to another delta

    @cached_property
    def address(self) -> int:
        return ctypes.addressof(self.structs)

    def address_of(self, factor: int) -> int:
        return self.address + factor * ctypes.sizeof(FactorStruct)

    def sparse_count(self, rows: int) -> int:
        """How many of the factors, from the first, are not expanded for so many rows."""
        if not self.dense_rows or rows < self.dense_rows[-1]:
            return len(self.dense_rows)
        return sum(least > rows for least in self.dense_rows)


@dataclass(frozen=True)
class NativeGroups:
    """The deltas of one step on one linear, with the memory that the structs point into."""

    structs: array[int]  # `dw_group` [count]: address of the factors, how many, address of the rows, how many
    count: int
    address: int
    expanded: Sequence[tuple[NativeFactors, int, slice | torch.Tensor]]  # (prepared, first factor, rows [t])
    owners: Sequence[tuple[NativeFactors, npt.NDArray[np.int64]]]


class NativeSparse:
    """Adds deltas with the C++ kernel: one call per linear for all deltas of the step and all parts of a fused linear.

    A tensor that is dense enough for the rows of its group is expanded and multiplied by torch instead (`choice.py`). Sums are in
    fp32. Up to the choice's `few_rows` rows of a delta, a row's result does not depend on what else is in the batch.
    """

    name = "native-sparse"

    def __init__(
        self, kernel: NativeKernel, num_threads: int, level: int | None = None, choice: Choice | None = None
    ) -> None:
        self.kernel = kernel
        self.num_threads = num_threads
        self.level = kernel.level if level is None else level
        self.choice = choice or choose(self.level)
        self._apply = kernel.library.dw_apply
        self._addresses: dict[int, tuple[npt.NDArray[np.int64], int]] = {}

    def prepare(self, factors: Sequence[SparseFactor]) -> NativeFactors:
        """Execution form of all parts of one linear."""
        found = (
            pack_factor(self.kernel.library, factor, self.choice.dense_from, self.choice.mask_from)
            for factor in factors
        )
        return self._with_structs(sorted((one for one in found if one is not None), key=self._dense_rows, reverse=True))

    def _with_structs(self, packed: Sequence[PackedFactor]) -> NativeFactors:
        structs = (FactorStruct * len(packed))()
        for i, one in enumerate(packed):
            structs[i] = FactorStruct(
                one.rank,
                one.out_features,
                one.in_features,
                one.out_offset,
                one.kind,
                self.choice.few_rows(one.density),
                int(one.identity_u),
                0,
                one.entries,
                one.coef.ctypes.data,
                _side_struct(one.v),
                _side_struct(one.u),
            )
        return NativeFactors(structs, tuple(packed), tuple(self._dense_rows(one) for one in packed))

    def _dense_rows(self, factor: PackedFactor) -> int:
        return self.choice.expanded_rows(factor.density)

    def scaled(self, prepared: NativeFactors, weight: float) -> NativeFactors:
        """The same delta times `weight`; entries are shared, so it costs the coefficients alone."""
        factors = [replace(factor, coef=factor.coef * np.float32(weight)) for factor in prepared.factors]
        return replace(self._with_structs(factors), shared=True)

    def nbytes(self, prepared: NativeFactors) -> int:
        """Bytes that `prepared` holds for itself."""
        own = [factor.coef.nbytes if prepared.shared else factor.nbytes for factor in prepared.factors]
        return ctypes.sizeof(prepared.structs) + sum(own)

    def describe(self, prepared: Iterable[NativeFactors]) -> str:
        """The forms that a delta was put into: for the log, once at load."""
        factors = [factor for one in prepared for factor in one.factors]
        forms: Counter[int] = Counter()
        for factor in factors:
            for side in factor.sides:
                forms.update(side.columns["form"].tolist())
        columns = {"whole": forms[DENSE], "masked": forms[MASK], "indexed": forms[INDEX16] + forms[INDEX32]}
        kinds = Counter(KINDS[factor.kind] for factor in factors)
        walked = Counter(self.choice.few_rows(factor.density) for factor in factors)
        expanded = sum(self._dense_rows(factor) < ALWAYS for factor in factors)
        return (
            f"{LEVELS[self.level]}; {', '.join(f'{count} {name}' for name, count in kinds.items())} tensors"
            f" ({sum(factor.identity_u for factor in factors)} entry by entry, {expanded} expanded for many rows);"
            f" columns {', '.join(f'{count} {name}' for name, count in columns.items())}; walked packed up to rows:"
            f" {', '.join(f'{rows} ({count})' for rows, count in sorted(walked.items()))}"
        )

    def group(self, parts: Sequence[tuple[NativeFactors, npt.NDArray[np.int64]]]) -> NativeGroups | None:
        """What `apply` needs for the deltas of one step on one linear: (prepared, rows [t]) per delta. None: nothing to add."""
        fields = array("q")
        expanded = []
        for prepared, rows in parts:
            count, factors = len(rows), len(prepared.factors)
            sparse = prepared.sparse_count(count)
            if sparse:
                fields.extend((prepared.address, sparse, self._address(rows), count))
            if sparse < factors:
                done = _blocks(count)[-1][1] if count >= _BLOCKS[-1] else 0
                if done:
                    expanded.append((prepared, sparse, _run_of(rows[:done])))
                if done < count:
                    rest = rows[done:]
                    fields.extend((prepared.address_of(sparse), factors - sparse, rest.ctypes.data, count - done))
        if not fields and not expanded:
            return None
        return NativeGroups(fields, len(fields) // 4, fields.buffer_info()[0], expanded, parts)

    def _address(self, rows: npt.NDArray[np.int64]) -> int:
        """Address of the row numbers: every linear of a step asks for the same few arrays, and numpy takes its time."""
        known = self._addresses.get(id(rows))
        if known is None:
            if len(self._addresses) >= _REMEMBERED:
                self._addresses.clear()
            known = self._addresses[id(rows)] = (rows, rows.ctypes.data)  # holds the array, so its id stays its own
        return known[1]

    def apply(self, y: torch.Tensor, x: torch.Tensor, groups: NativeGroups) -> None:
        """y [T, m] += delta(x [T, n]) for the rows of each group, in place; bf16 or fp32, accumulated in fp32."""
        x_stride, along = x.stride()
        if along != 1:
            x = x.contiguous()
            x_stride = x.stride(0)
        if groups.count:
            self._apply(
                groups.address,
                groups.count,
                x.data_ptr(),
                x_stride,
                y.data_ptr(),
                y.stride(0),
                y.dtype is torch.bfloat16,
                self.num_threads,
                self.level,
            )
        for prepared, first, rows in groups.expanded:
            self._add_expanded(y, x[rows], prepared, first, rows)

    def _add_expanded(
        self, y: torch.Tensor, x: torch.Tensor, prepared: NativeFactors, first: int, rows: slice | torch.Tensor
    ) -> None:
        """y[rows] += the factors from `first` on, as dense low-rank pairs; x [t, n] is what belongs to the rows.

        In bf16 where the CPU multiplies it (x . V is rounded to bf16 then, as between two layers), else in fp32.
        """
        dtype = torch.bfloat16 if self.choice.dense_bf16 and y.dtype is torch.bfloat16 else torch.float32
        x = x.to(dtype)
        for i in range(first, len(prepared.factors)):
            factor = prepared.factors[i]
            coef = torch.from_numpy(factor.coef)
            v = self.expand(prepared, i, 0, dtype)
            u = v.T if factor.identity_u else self.expand(prepared, i, 1, dtype)
            scale = coef if factor.identity_u else torch.nn.functional.pad(coef, (0, len(v) - len(coef)))
            part = y[:, factor.out_offset : factor.out_offset + factor.out_features]
            for start, stop in _blocks(len(x)):
                own = x[start:stop]
                z = ((own if factor.identity_u else own @ v.T).float() * scale).to(dtype)
                at = slice(rows.start + start, rows.start + stop) if isinstance(rows, slice) else rows[start:stop]
                if isinstance(at, slice) and dtype is y.dtype:
                    part[at].addmm_(z, u)
                else:
                    part[at] = torch.addmm(part[at].to(dtype), z, u).to(y.dtype)

    def expand(self, prepared: NativeFactors, index: int, side: int, dtype: torch.dtype) -> torch.Tensor:
        """Side 0 (V^T [r, n]) or 1 (U^T [r, m]) of one factor as a dense matrix, fp32 or bf16; r is padded with zeros to _RANKS."""
        factor = prepared.factors[index]
        rows = factor.out_features if side else factor.in_features
        ranks = factor.rank if factor.identity_u else -(-factor.rank // _RANKS) * _RANKS
        dense = torch.empty(ranks, -(-rows // PAD) * PAD, dtype=dtype)
        dense[factor.rank :] = 0
        self.kernel.library.dw_dense(
            prepared.address_of(index), side, dense.data_ptr(), dtype is torch.bfloat16, self.level
        )
        return dense[:, :rows]


def _blocks(rows: int) -> list[tuple[int, int]]:
    """(first row, end) of the blocks that so many rows are multiplied in; the last few rows are in none."""
    blocks, start = [], 0
    for size in _BLOCKS:
        for _ in range((rows - start) // size):
            blocks.append((start, start + size))
            start += size
    return blocks


def _run_of(rows: npt.NDArray[np.int64]) -> slice | torch.Tensor:
    """A slice where the rows follow one another, as those of one prompt do."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    return slice(first, last) if last - first == len(rows) else torch.from_numpy(rows)


def _side_struct(side: Side | None) -> SideStruct:
    if side is None:
        return SideStruct(None, None, None)
    return SideStruct(side.values.ctypes.data, side.index.ctypes.data, side.columns.ctypes.data)
