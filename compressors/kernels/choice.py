"""Which product a tensor takes at which number of rows, from measurements (`deltaworks bench kernel`)."""

from __future__ import annotations

from dataclasses import dataclass

NEVER = 1 << 62


@dataclass(frozen=True)
class Choice:
    """`mask_from`, `dense_from`: least density of a column that is stored with a bitmask, or whole. `few_rows`: most rows of a
    delta that walk the packed columns as they are; more of them decode the columns first. `dense`: from this density of a
    tensor and this number of rows on, the tensor is expanded and multiplied by torch.
    """

    mask_from: float
    dense_from: float
    few_rows: int
    dense: tuple[tuple[float, int], ...]  # (density, rows), falling density

    def dense_rows(self, density: float) -> int:
        """Rows from which a tensor of this density is multiplied as a dense low-rank pair."""
        return min((rows for least, rows in self.dense if density >= least), default=NEVER)


CHOICES = (
    Choice(mask_from=2.0, dense_from=0.7, few_rows=4, dense=((0.5, 64),)),
    Choice(mask_from=0.2, dense_from=0.7, few_rows=4, dense=((0.5, 64),)),
    Choice(mask_from=0.1, dense_from=0.8, few_rows=4, dense=((0.3, 64),)),
)
