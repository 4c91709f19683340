"""Every compression method, as a literal table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from compressors.baselines import BitDeltaConfig, DareConfig, LowRankConfig, encode_bitdelta, encode_dare
from compressors.encode import encode_impart, encode_lowrank
from compressors.impart import ImPartConfig
from compressors.quantize import ImPartQtConfig, encode_impart_qt
from compressors.record import Encoded
from compressors.spectrum import Spectrum, TooFewTriplesError, decompose, decompose_first, gram

Config = ImPartConfig | ImPartQtConfig | LowRankConfig | DareConfig | BitDeltaConfig


@dataclass(frozen=True)
class Method:
    """Settings, and what makes a record of (name, delta [out, in] in fp32 and not all zero, settings).

    `of_spectrum` does the same with the delta's spectrum between name and delta, for methods that need it. `from_first`: settings
    with which it hangs on the triples that are kept alone, so that the first ones may do.
    """

    config: type[Any]
    encode: Callable[[str, torch.Tensor, Any], Encoded] | None = None
    of_spectrum: Callable[[str, Spectrum, torch.Tensor, Any], Encoded] | None = None
    from_first: Callable[[Any], bool] = lambda config: False


def _counts_values(config: ImPartConfig | LowRankConfig) -> bool:
    """The paper's allocator drops trailing columns until the budget is met, whatever their values; a search by bytes does not."""
    return config.bytes_ratio is None


METHODS: dict[str, Method] = {
    "impart": Method(ImPartConfig, of_spectrum=encode_impart, from_first=_counts_values),
    "impart-qt": Method(ImPartQtConfig, of_spectrum=encode_impart_qt),
    "lowrank": Method(LowRankConfig, of_spectrum=encode_lowrank, from_first=_counts_values),
    "dare": Method(DareConfig, encode_dare),
    "bitdelta": Method(BitDeltaConfig, encode_bitdelta),
}


def encode_projection(name: str, delta: torch.Tensor, configs: Sequence[Config]) -> list[Encoded]:
    """The records of one projection, one per settings; a zero delta stores nothing. It is decomposed at most once."""
    if not delta.any():
        return [Encoded(name, "zero", (delta.shape[0], delta.shape[1]))] * len(configs)
    spectra = _Spectra(delta)
    found = []
    for config in configs:
        method = METHODS[config.method]
        if method.encode is not None:
            found.append(method.encode(name, delta, config))
        if method.of_spectrum is not None:
            found.append(_of_spectrum(method.of_spectrum, name, spectra, config, method.from_first(config)))
    return found


class _Spectra:
    """Of one delta: all triples, and the first ones; either is made when it is first asked for, from the same Gram matrix.

    By `cache` on the instance: Python 3.11's cached_property holds one lock for all instances, so that matrices would wait
    for each other.
    """

    def __init__(self, delta: torch.Tensor) -> None:
        self.delta = delta
        lower = cache(lambda: gram(delta))
        self.whole = cache(lambda: decompose(delta, lower()))
        self.first = cache(lambda: decompose_first(delta, lower()))


def _of_spectrum(
    encode: Callable[[str, Spectrum, torch.Tensor, Any], Encoded],
    name: str,
    spectra: _Spectra,
    config: Config,
    from_first: bool,
) -> Encoded:
    first = spectra.first() if from_first else None
    if first is not None:
        with suppress(TooFewTriplesError):
            return encode(name, first, spectra.delta, config)
    return encode(name, spectra.whole(), spectra.delta, config)
