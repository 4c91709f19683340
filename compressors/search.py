"""`--auto`: the method and settings whose delta, at a number of bytes, is closest to the fine-tune on a text.

Every candidate is made in one pass over the matrices and judged by what the model says (compressors/divergence.py). Which one
wins depends on the delta: plain truncation where few directions carry it, DARE's seeded entries where nothing does, narrow
values nearly always.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from compressors.artifact import Artifact
from compressors.baselines import BitDeltaConfig, DareConfig, LowRankConfig
from compressors.calibration import Calibration
from compressors.compress import compress_each
from compressors.divergence import Divergence
from compressors.errors import BudgetError
from compressors.impart import ImPartConfig
from compressors.methods import Config
from compressors.quantize import ImPartQtConfig

GRID = ((0.0, 0.5), (0.0, 1.0), (0.6, 0.5), (0.6, 1.0), (0.6, 2.0), (0.8, 0.5), (0.8, 1.0))  # (beta, C)
_OVERSHOOT = 1.02  # of the bytes asked for
_WIDE_RATIO = (
    2.0  # up to here 8 bits have room for every entry of the delta, so that only wider values can add anything
)


@dataclass(frozen=True)
class Trial:
    """A candidate: bytes of its file and mean KL to the fine-tune in nats; `fits`: within the bytes asked for."""

    config: Config
    nbytes: int
    kl: float
    fits: bool

    @property
    def label(self) -> str:
        """Method and settings, as they are given on the command line."""
        told = {one.name: getattr(self.config, one.name) for one in fields(self.config)}
        names = [name for name in ("beta", "c", "value_dtype", "per_row") if name in told]
        return " ".join([self.config.method, *(f"{name}={told[name]}" for name in names)])


def candidates(bytes_ratio: float, seed: int, rows_dtype: str, method: str | None = None) -> list[Config]:
    """What is tried, of one method or of all. Raises BudgetError for a method without a candidate."""
    size: dict[str, Any] = {"bytes_ratio": bytes_ratio, "rows_dtype": rows_dtype}
    widths = ("int4", "int8") if bytes_ratio > _WIDE_RATIO else ("int4", "int8", "fp16")
    found: list[Config] = [
        ImPartConfig(**size, beta=beta, c=c, value_dtype=dtype, seed=seed) for dtype in widths for beta, c in GRID
    ]
    found += [ImPartQtConfig(**size, beta=beta, c=c, seed=seed) for beta, c in GRID]
    found += [LowRankConfig(**size, value_dtype=dtype) for dtype in widths]
    found += [DareConfig(**size, value_dtype=dtype, seed=seed) for dtype in widths]
    found += [BitDeltaConfig(per_row=per_row, rows_dtype=rows_dtype) for per_row in (False, True)]
    chosen = [one for one in found if method in (None, one.method)]
    if not chosen:
        raise BudgetError(f"auto knows no candidate of the method {method!r}")
    return chosen


def fits(delta: Path, bytes_ratio: float) -> bool:
    """Whether the projections of a delta file take no more than 2 % above the bytes asked for."""
    with Artifact.open(delta) as artifact:
        found = artifact.manifest.ratios.projection_bytes
    return found is None or found * _OVERSHOOT >= bytes_ratio


def search(
    base: Path,
    fine_tune: Path,
    out: Path,
    tried: Sequence[Config],
    bytes_ratio: float,
    calibration: Calibration,
    name: str | None = None,
    progress: bool = False,
    report: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Write the best candidate as `out`; all trials, the best first. `report` is called with each as it is known.

    A candidate that takes more than 2 % above the bytes asked for (BitDelta has one size) is judged, and not chosen.
    Raises BudgetError where none fits, CheckpointError.
    """
    divergence = Divergence(base, fine_tune, calibration)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        paths = [Path(folder, str(number)) for number in range(len(tried))]
        compress_each(base, fine_tune, list(zip(tried, paths, strict=True)), name, progress)
        trials: list[tuple[Trial, Path]] = []
        pairs = zip(tried, paths, strict=True)
        for config, path in tqdm(pairs, "judging", total=len(tried), unit="candidate", disable=not progress):
            trial = Trial(config, path.stat().st_size, divergence.of(path).kl, fits(path, bytes_ratio))
            trials.append((trial, path))
            report(trials[-1][0])
        trials.sort(key=lambda one: (not one[0].fits, one[0].kl))
        if not trials[0][0].fits:
            raise BudgetError(
                f"no candidate fits bytes_ratio {bytes_ratio:g}: the smallest unit of this model is larger"
            )
        trials[0][1].replace(out)
    return [trial for trial, _ in trials]
