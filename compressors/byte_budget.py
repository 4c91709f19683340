"""Drop ratios that fill a number of bytes: values, coefficients, counts and masks, as they are written.

The paper's ratio counts surviving values only. Here the ratio is searched that fills what the bytes pay for, and what is left
then goes to the last kept column, the one that the boundary shift cut (ImPart, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compressors.impart import drop_ratios, kept_counts
from compressors.mask_codes import Code, mask_bytes
from compressors.values import ValueForm

BYTES_A_COLUMN = 12  # coef, keep_u, keep_v
_STEPS = 40  # halvings of the logarithm of the ratio


@dataclass(frozen=True)
class Price:
    """What kept columns take: values in `form`, and masks in `code` where they are written out."""

    form: ValueForm
    code: Code | None

    def nbytes(self, drops: npt.NDArray[np.float64], shape: tuple[int, int]) -> int:
        """Bytes of the record that these drop ratios give; of gap8 masks the mean."""
        kept = drops[drops < 1]
        total = BYTES_A_COLUMN * len(kept)
        for rows in shape:
            keep = kept_counts(kept, rows)
            mask = 0.0 if self.code is None else mask_bytes(self.code, keep, rows).sum()
            total += self.form.nbytes(keep) + int(np.ceil(mask))
        return total

    def settled(self, drops: list[float], shape: tuple[int, int]) -> npt.NDArray[np.float64]:
        """Drop ratios, 0 where a whole column, which has no mask, takes no more than the dropped one."""
        found = np.array(drops)
        if self.code is None:
            return found
        rank = int((found < 1).sum())
        widths, spared = self.form.widths(rank), np.zeros(rank)
        for rows in shape:
            keep = kept_counts(found[:rank], rows)
            spared += widths * (rows - keep) / 8 - mask_bytes(self.code, keep, rows)
        found[:rank][spared <= 0] = 0.0
        return found


def drops_within(
    sigma: npt.NDArray[np.float64], shape: tuple[int, int], budget: int, beta: float, c: float, price: Price
) -> list[float]:
    """Drop ratios whose record takes at most `budget` bytes, as near to it as whole entries allow.

    At least one column is kept, which a budget below it does not pay for.
    """
    low, high = 0.0, np.log(2.0 * shape[0] * shape[1])  # of ln(ratio): everything, and less than a column
    best = np.array(drop_ratios(sigma, shape, float(np.exp(high)), beta, c, "exact"))
    for _ in range(_STEPS):
        middle = (low + high) / 2
        tried = price.settled(drop_ratios(sigma, shape, float(np.exp(middle)), beta, c, "exact"), shape)
        if price.nbytes(tried, shape) <= budget:
            best, high = tried, middle
        else:
            low = middle
    return _filled(best, shape, budget, price)


def _filled(drops: npt.NDArray[np.float64], shape: tuple[int, int], budget: int, price: Price) -> list[float]:
    """The bytes that are left go into the last columns' entries.

    Where all kept columns are whole, one column is added and shares its entries with the last: both keep half or more of them,
    because a column of few entries, rescaled, would be nothing but noise.
    """
    filled = drops.copy()
    rank = int((filled < 1).sum())
    for k in range(rank - 1, -1, -1):
        filled[k] = _lowest(filled, [k], filled[k], shape, budget, price)
        if filled[k] > 0:
            return [float(drop) for drop in filled]
    last = [rank - 1, rank]
    if rank < len(filled) and price.nbytes(_with(filled, last, 0.5), shape) <= budget:
        filled[last] = _lowest(filled, last, 0.5, shape, budget, price)
    return [float(drop) for drop in filled]


def _lowest(
    drops: npt.NDArray[np.float64],
    columns: list[int],
    fits: float,
    shape: tuple[int, int],
    budget: int,
    price: Price,
) -> float:
    """The lowest drop ratio of these columns that the budget pays for; `fits` is one."""
    if price.nbytes(_with(drops, columns, 0.0), shape) <= budget:
        return 0.0
    low = 0.0
    for _ in range(_STEPS):
        middle = (low + fits) / 2
        if price.nbytes(_with(drops, columns, middle), shape) <= budget:
            fits = middle
        else:
            low = middle
    return fits


def _with(drops: npt.NDArray[np.float64], columns: list[int], drop: float) -> npt.NDArray[np.float64]:
    tried = drops.copy()
    tried[columns] = drop
    return tried
