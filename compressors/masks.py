"""Seeded masks: which entries of a factor are kept, from integers alone, so that a file stores no index.

The rule (all arithmetic modulo 2^64) is part of the artifact format and must never change. torch's, numpy's and Python's own
random streams may, which is why none is used. The paper (ImPart, App. B.3) seeds from sigma_k, which depends on rounding.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_BLOCK_HASHES = 1 << 20  # bounds the working memory of factor_rows to a few tens of megabytes


def mix(z: int) -> int:
    """The finaliser of SplitMix64."""
    z ^= z >> 30
    z = z * 0xBF58476D1CE4E5B9 & _MASK64
    z ^= z >> 27
    z = z * 0x94D049BB133111EB & _MASK64
    return z ^ z >> 31


def layer_seed(delta_seed: int, name: str) -> int:
    """Seed of one tensor: the first 8 bytes, little endian, of SHA-256(delta_seed as 8 bytes LE || name)."""
    digest = hashlib.sha256(delta_seed.to_bytes(8, "little") + name.encode()).digest()
    return int.from_bytes(digest[:8], "little")


def column_key(seed: int, k: int, f: int) -> int:
    """Key of column k of factor f (0 = U, 1 = V)."""
    return mix((seed + (2 * k + f + 1) * GOLDEN) & _MASK64)


def column_keys(seed: int, f: int, rank: int) -> npt.NDArray[np.uint64]:
    """Keys of the columns 0..rank-1 of factor f: u64 [rank]."""
    steps = np.arange(rank, dtype=np.uint64) * np.uint64(2) + np.uint64(f + 1)
    return _mix(np.uint64(seed) + steps * np.uint64(GOLDEN))


def kept_rows(seed: int, k: int, f: int, rows: int, keep: int) -> npt.NDArray[np.int32]:
    """The `keep` rows of column k with the smallest (hash, row), ascending: i32 [keep]."""
    keys = np.array([column_key(seed, k, f)], dtype=np.uint64)
    return _smallest(keys, np.array([keep]), rows)


def factor_rows(seed: int, f: int, rows: int, keep: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Kept rows of all columns of factor f, column after column: i32 [sum(keep)]."""
    keys = column_keys(seed, f, len(keep))
    block = max(1, _BLOCK_HASHES // rows)
    blocks = [_smallest(keys[i : i + block], keep[i : i + block], rows) for i in range(0, len(keep), block)]
    return np.concatenate(blocks) if blocks else np.empty(0, dtype=np.int32)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = z ^ (z >> np.uint64(30))
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _smallest(keys: npt.NDArray[np.uint64], keep: npt.NDArray[np.integer], rows: int) -> npt.NDArray[np.int32]:
    steps = np.arange(1, rows + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    hashes = _mix(keys[:, None] + steps[None, :])
    bound = np.sort(hashes, axis=1)[np.arange(len(keys)), np.asarray(keep) - 1]
    selected = hashes <= bound[:, None]
    for k in np.flatnonzero(selected.sum(axis=1) > keep):  # equal hashes at the bound: the smaller row wins
        tied = np.flatnonzero(hashes[k] == bound[k])
        selected[k, tied[len(tied) - (selected[k].sum() - keep[k]) :]] = False
    return np.nonzero(selected)[1].astype(np.int32)
