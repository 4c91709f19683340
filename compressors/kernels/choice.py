"""Which product a tensor takes at which number of rows, from measurements (`deltaworks bench kernel`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

ALWAYS = (1 << 31) - 1  # rows
Steps = tuple[
    tuple[float, int], ...
]  # (density, rows), density falling: the first that the tensor's density reaches counts


@dataclass(frozen=True)
class Choice:
    """`mask_from`, `dense_from`: least density of a column that is stored with a bitmask, or whole. `few`: up to so many rows of a
    delta the packed columns are walked as they are, for each four rows again; for more they are decoded first, and walked for each
    sixteen. `expanded`: from so many rows on, the tensor is made a dense pair that torch multiplies, in bf16 if `dense_bf16`.
    """

    mask_from: float
    dense_from: float
    few: Steps
    expanded: Steps = ()
    dense_bf16: bool = False

    def few_rows(self, density: float) -> int:
        return next((rows for least, rows in self.few if density >= least), 0)

    def expanded_rows(self, density: float) -> int:
        return next((rows for least, rows in self.expanded if density >= least), ALWAYS)


# By instruction level. Measured for AVX2 on an AMD EPYC (Zen 3), one thread, a tensor of 1536 x 576 with 1/16 of its numbers, in
# microseconds (index / mask / whole / decoded; torch's fp32 product of the expanded pair never won):
#   density .1: 1 row 27/69/50/187, 4 rows 178/135/161/194, 8 rows 245/269/313/187
#   density .2: 1 row 26/36/27/153, 4 rows 123/72/87/161, 8 rows 244/139/166/156, 16 rows 675/413/435/246
#   density .3: 1 row 26/26/19/145, 4 rows 122/50/64/138, 8 rows 242/96/108/140, 16 rows 660/265/268/167
#   density .5: 1 row 26/17/12/137, 16 rows 474/120/110/167, 64 rows 1930/474/428/408
#   density 1: 1 row 26/11/8/124, 64 rows -/250/237/370, 256 rows -/1028/1000/1352
# From a density of .4 on "whole" columns are worth their bytes: a real delta (3.3 M entries, mean density .27) took 10 % less time
# for 15 % more bytes. Not measured but derived: the portable level (no expanding instruction, so masks would save bytes only) and
# AVX-512 (16 positions for the work of 8).
PORTABLE = Choice(mask_from=2.0, dense_from=0.5, few=((0.9, ALWAYS), (0.5, 16), (0.0, 4)))
AVX2 = Choice(mask_from=0.2, dense_from=0.4, few=((0.9, ALWAYS), (0.5, 32), (0.2, 8), (0.0, 4)))
AVX512 = Choice(mask_from=0.1, dense_from=0.7, few=((0.9, ALWAYS), (0.5, 32), (0.2, 8), (0.0, 4)))
_BY_LEVEL = (PORTABLE, AVX2, AVX512)


def choose(level: int) -> Choice:
    """The choice of a level, and of this CPU: where it multiplies bf16, dense tensors are worth expanding for many rows."""
    choice = _BY_LEVEL[level]
    # 4096 x 4096 with 1/32 of its numbers, rank 148, 256 rows, on an EPYC with AVX512-BF16: 1.8 ms; the base: 41 ms.
    multiplies_bf16: Callable[[], bool] = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    if level == 2 and multiplies_bf16():
        return replace(choice, expanded=((0.3, 64),), dense_bf16=True)
    return choice
