"""ctypes view of the C++ kernel: factors of a delta in, additions to a linear's output out."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from compressors.execution import SparseFactor
from compressors.kernels.build import KernelUnavailableError, library


class FactorStruct(ctypes.Structure):
    """`dw_factor`: one delta on one part of a linear."""

    _fields_ = (
        ("rank", ctypes.c_int32),
        ("out_features", ctypes.c_int32),
        ("in_features", ctypes.c_int32),
        ("out_offset", ctypes.c_int32),
        ("packed", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("coef", ctypes.c_void_p),
        ("v_start", ctypes.c_void_p),
        ("u_start", ctypes.c_void_p),
        ("v_entries", ctypes.c_void_p),
        ("u_entries", ctypes.c_void_p),
    )


class GroupStruct(ctypes.Structure):
    """`dw_group`: the batch rows that use one delta, with that delta's factors of the linear."""

    _fields_ = (
        ("factors", ctypes.c_void_p),
        ("num_factors", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
    )


@dataclass(frozen=True)
class NativeKernel:
    """The loaded library. Pointers are raw addresses; the caller keeps the memory behind them alive."""

    library: ctypes.CDLL

    @classmethod
    def load(cls) -> NativeKernel:
        """Raises KernelUnavailableError when the library cannot be built or loaded here."""
        path = library()
        try:
            handle = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelUnavailableError(f"{path} does not load: {error}") from error
        handle.dw_apply.restype = None
        handle.dw_apply.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int32,
            ctypes.c_int32,
        ]
        handle.dw_kept_rows.restype = None
        handle.dw_kept_rows.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
        return cls(handle)

    def kept_rows(
        self, keys: npt.NDArray[np.uint64], keep: npt.NDArray[np.int32], num_rows: int
    ) -> npt.NDArray[np.int32]:
        """Seeded masks of one factor, all columns: the same rows as `compressors.masks.factor_rows`."""
        keys = np.ascontiguousarray(keys, dtype=np.uint64)
        keep = np.ascontiguousarray(keep, dtype=np.int32)
        rows = np.empty(int(keep.sum()), dtype=np.int32)
        self.library.dw_kept_rows(keys.ctypes.data, keep.ctypes.data, len(keep), num_rows, rows.ctypes.data)
        return rows


@dataclass(frozen=True)
class NativeFactors:
    """All parts of one linear for one delta, with the memory that the structs point into."""

    structs: ctypes.Array[FactorStruct]
    factors: tuple[SparseFactor, ...]
    shared: bool = False  # all but the coefficients belongs to another delta


@dataclass(frozen=True)
class NativeGroups:
    """The deltas of one step on one linear, with the memory that the structs point into."""

    structs: ctypes.Array[GroupStruct]
    address: int
    owners: tuple[tuple[NativeFactors, npt.NDArray[np.int64]], ...]


class NativeSparse:
    """Adds deltas with the C++ kernel: one call per linear for all deltas of the step and all parts of a fused linear."""

    name = "native-sparse"

    def __init__(self, kernel: NativeKernel, num_threads: int) -> None:
        self.kernel = kernel
        self.num_threads = num_threads

    def prepare(self, factors: Sequence[SparseFactor]) -> NativeFactors:
        """Execution form of all parts of one linear."""
        structs = (FactorStruct * len(factors))()
        for i, factor in enumerate(factors):
            structs[i] = FactorStruct(
                factor.rank,
                factor.out_features,
                factor.in_features,
                factor.out_offset,
                int(factor.packed),
                0,
                factor.coef.ctypes.data,
                factor.v_start.ctypes.data,
                factor.u_start.ctypes.data,
                factor.v_entries.ctypes.data,
                factor.u_entries.ctypes.data,
            )
        return NativeFactors(structs, tuple(factors))

    def scaled(self, prepared: NativeFactors, weight: float) -> NativeFactors:
        """The same delta times `weight`; entries are shared, so it costs the coefficients alone."""
        factors = [replace(factor, coef=factor.coef * np.float32(weight)) for factor in prepared.factors]
        return replace(self.prepare(factors), shared=True)

    def nbytes(self, prepared: NativeFactors) -> int:
        """Bytes that `prepared` holds for itself."""
        own = [factor.coef.nbytes if prepared.shared else factor.nbytes for factor in prepared.factors]
        return ctypes.sizeof(prepared.structs) + sum(own)

    def group(self, parts: Sequence[tuple[NativeFactors, npt.NDArray[np.int64]]]) -> NativeGroups:
        """What `apply` needs for the deltas of one step on one linear: (prepared, rows [t]) per delta."""
        structs = (GroupStruct * len(parts))()
        for i, (prepared, rows) in enumerate(parts):
            factors = ctypes.addressof(prepared.structs)
            structs[i] = GroupStruct(factors, len(prepared.structs), rows.ctypes.data, len(rows))
        return NativeGroups(structs, ctypes.addressof(structs), tuple(parts))

    def apply(self, y: torch.Tensor, x: torch.Tensor, groups: NativeGroups) -> None:
        """y [T, m] += delta(x [T, n]) for the rows of each group, in place; bf16 or fp32, accumulated in fp32."""
        if x.stride(-1) != 1:
            x = x.contiguous()
        self.kernel.library.dw_apply(
            groups.address,
            len(groups.structs),
            x.data_ptr(),
            x.stride(0),
            y.data_ptr(),
            y.stride(0),
            int(y.dtype == torch.bfloat16),
            self.num_threads,
        )
