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
    delta the packed columns are walked as they are, for each eight rows again; for more they are decoded first, and walked for each
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


# By instruction level. Measured on an AMD EPYC (Zen 4), one thread, a tensor of 1536 x 576 with 1/16 of its numbers as int8, in
# parts of the base's bf16 product (`deltaworks bench kernel`):
#   AVX-512, index / mask / whole / decoded / expanded bf16
#     density .1:  1 row .32/.45/.34/1.4, 8 rows .37/.91/1.2/.89, 16 rows .49/1.2/1.6/.62, 512 rows decoded .43, expanded .72
#     density .2:  1 row .30/.29/.20/1.4, 8 rows .37/.49/.64/.86, 16 rows .49/.65/.88/.60, 512 rows decoded .45, expanded .37
#     density .3:  1 row .30/.21/.15/1.3, 8 rows .36/.35/.46/.86, 32 rows .57/.54/.73/.55, 128 rows decoded .49, expanded .39
#     density .5:  1 row .30/.13/.09/1.4, 8 rows .36/.21/.17/.87, 64 rows .62/.35/.28/.52, 128 rows whole .30, expanded .28
#     density 1:   8 rows whole .13, 64 rows whole .17, 128 rows whole .18, expanded .19, 512 rows whole .17, expanded .10
#   AVX2, index / mask / whole / decoded
#     density .2: 1 row .27/.29/.21, 8 rows .46/.67/.64, 16 rows .60/.88/.83/.64, 32 rows .73/1.1/1.0/.60
#     density .4: 1 row .27/.17/.13, 8 rows .44/.35/.38, 16 rows .58/.45/.49/.64, 32 rows .70/.54/.58/.60
#   portable (a stored mask costs as much as ten indices), index / whole
#     density .3: 1 row .42/1.2, 8 rows 1.1/1.5; density 1: 1 row .42/.39, 8 rows 1.1/.48
# From a density of .4 on "whole" columns are worth their bytes. A real delta at ratio 32 (3.3 M entries, of which a half lie in
# columns under a density of .2, and a third in whole ones) takes 1.6 ms for 1 row and 3.6 ms for 8.
PORTABLE = Choice(mask_from=2.0, dense_from=0.5, few=((0.9, ALWAYS), (0.0, 16)))
AVX2 = Choice(mask_from=0.25, dense_from=0.4, few=((0.4, 64), (0.0, 16)))
AVX512 = Choice(mask_from=0.25, dense_from=0.4, few=((0.4, ALWAYS), (0.0, 24)))
_BY_LEVEL = (PORTABLE, AVX2, AVX512)


def choose(level: int) -> Choice:
    """The choice of a level, and of this CPU: where it multiplies bf16, dense tensors are worth expanding for many rows."""
    choice = _BY_LEVEL[level]
    multiplies_bf16: Callable[[], bool] = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    if level == 2 and multiplies_bf16():
        return replace(choice, expanded=((0.25, 128), (0.18, 512)), dense_bf16=True)
    return choice
