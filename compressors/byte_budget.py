"""Drop ratios that fill a number of bytes: values, coefficients and counts, as they are written.

The paper's ratio counts surviving values only. Here the ratio is searched that fills what the bytes pay for, and what is left
then goes to the last kept column, the one that the boundary shift cut (ImPart, section 3.2).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from compressors.impart import drop_ratios, kept_counts
from compressors.values import ValueForm

BYTES_A_COLUMN = 12  # coef, keep_u, keep_v
_STEPS = 40  # halvings of the logarithm of the ratio


def factor_bytes(drops: npt.NDArray[np.float64], shape: tuple[int, int], form: ValueForm) -> int:
    """Bytes of the record that these drop ratios give."""
    kept = drops[drops < 1]
    return BYTES_A_COLUMN * len(kept) + sum(form.nbytes(kept_counts(kept, rows)) for rows in shape)


def drops_within(
    sigma: npt.NDArray[np.float64], shape: tuple[int, int], budget: int, beta: float, c: float, form: ValueForm
) -> list[float]:
    """Drop ratios whose record takes at most `budget` bytes, as near to it as whole entries allow.

    At least one column is kept, which a budget below it does not pay for.
    """
    low, high = 0.0, np.log(2.0 * shape[0] * shape[1])  # of ln(ratio): everything, and less than a column
    best = drop_ratios(sigma, shape, float(np.exp(high)), beta, c, "exact")
    for _ in range(_STEPS):
        middle = (low + high) / 2
        tried = drop_ratios(sigma, shape, float(np.exp(middle)), beta, c, "exact")
        if factor_bytes(np.array(tried), shape, form) <= budget:
            best, high = tried, middle
        else:
            low = middle
    return _filled(best, shape, budget, form)


def _filled(drops: list[float], shape: tuple[int, int], budget: int, form: ValueForm) -> list[float]:
    """The bytes that are left go into the last columns' entries.

    Where all kept columns are whole, one column is added and shares its entries with the last: both keep half or more of them,
    because a column of few entries, rescaled, would be nothing but noise.
    """
    filled = np.array(drops)
    rank = int((filled < 1).sum())
    for k in range(rank - 1, -1, -1):
        filled[k] = _lowest(filled, [k], filled[k], shape, budget, form)
        if filled[k] > 0:
            return [float(drop) for drop in filled]
    last = [rank - 1, rank]
    if rank < len(filled) and factor_bytes(_with(filled, last, 0.5), shape, form) <= budget:
        filled[last] = _lowest(filled, last, 0.5, shape, budget, form)
    return [float(drop) for drop in filled]


def _lowest(
    drops: npt.NDArray[np.float64],
    columns: list[int],
    fits: float,
    shape: tuple[int, int],
    budget: int,
    form: ValueForm,
) -> float:
    """The lowest drop ratio of these columns that the budget pays for; `fits` is one."""
    if factor_bytes(_with(drops, columns, 0.0), shape, form) <= budget:
        return 0.0
    low = 0.0
    for _ in range(_STEPS):
        middle = (low + fits) / 2
        if factor_bytes(_with(drops, columns, middle), shape, form) <= budget:
            fits = middle
        else:
            low = middle
    return fits


def _with(drops: npt.NDArray[np.float64], columns: list[int], drop: float) -> npt.NDArray[np.float64]:
    tried = drops.copy()
    tried[columns] = drop
    return tried
