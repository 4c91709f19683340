"""Drop ratios that fill a number of bytes: values, coefficients and counts, as they are written.

The paper's ratio counts surviving values only. Here the ratio is searched that fills what the bytes pay for, and what is left
then goes to the last kept column, the one that the boundary shift cut (ImPart, section 3.2).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from compressors.impart import drop_ratios, kept_counts
from compressors.values import stored_bytes

BYTES_A_COLUMN = 12  # coef, keep_u, keep_v
_STEPS = 40  # halvings of the logarithm of the ratio


def factor_bytes(drops: npt.NDArray[np.float64], shape: tuple[int, int], value_dtype: str) -> int:
    """Bytes of the record that these drop ratios give."""
    kept = drops[drops < 1]
    return BYTES_A_COLUMN * len(kept) + sum(stored_bytes(kept_counts(kept, rows), value_dtype) for rows in shape)


def drops_within(
    sigma: npt.NDArray[np.float64], shape: tuple[int, int], budget: int, beta: float, c: float, value_dtype: str
) -> list[float]:
    """Drop ratios whose record takes at most `budget` bytes, as near to it as whole entries allow.

    At least one column is kept, which a budget below it does not pay for.
    """
    low, high = 0.0, np.log(2.0 * shape[0] * shape[1])  # of ln(ratio): everything, and less than a column
    best = drop_ratios(sigma, shape, float(np.exp(high)), beta, c, "exact")
    for _ in range(_STEPS):
        middle = (low + high) / 2
        tried = drop_ratios(sigma, shape, float(np.exp(middle)), beta, c, "exact")
        if factor_bytes(np.array(tried), shape, value_dtype) <= budget:
            best, high = tried, middle
        else:
            low = middle
    return _filled(best, shape, budget, value_dtype)


def _filled(drops: list[float], shape: tuple[int, int], budget: int, value_dtype: str) -> list[float]:
    """The bytes that are left go into the last columns' entries, and into one column more where they pay for it."""
    filled = np.array(drops)
    for k in range(len(filled) - 1, -1, -1):
        following = filled[k] >= 1 and (k == 0 or filled[k - 1] < 1)
        if filled[k] >= 1 and not following:
            continue
        low, high = 0.0, float(min(filled[k], 1 - 0.5 / max(shape)))
        for _ in range(_STEPS):
            middle = (low + high) / 2
            if _bytes_with(filled, k, middle, shape, value_dtype) <= budget:
                high = middle
            else:
                low = middle
        if _bytes_with(filled, k, high, shape, value_dtype) <= budget:
            filled[k] = high
        if not following:
            break
    return [float(drop) for drop in filled]


def _bytes_with(drops: npt.NDArray[np.float64], k: int, drop: float, shape: tuple[int, int], value_dtype: str) -> int:
    tried = drops.copy()
    tried[k] = drop
    return factor_bytes(tried, shape, value_dtype)
