"""Every compression method, as a literal table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compressors.baselines import BitDeltaConfig, DareConfig, LowRankConfig, encode_bitdelta, encode_dare
from compressors.encode import encode_impart, encode_lowrank
from compressors.impart import ImPartConfig, Spectrum, decompose
from compressors.quantize import ImPartQtConfig, encode_impart_qt
from compressors.record import Encoded

Config = ImPartConfig | ImPartQtConfig | LowRankConfig | DareConfig | BitDeltaConfig


@dataclass(frozen=True)
class Method:
    """Settings, and what makes a record of (name, delta [out, in] in fp32 and not all zero, settings).

    `of_spectrum` does the same with the delta's spectrum between name and delta, for methods that need it.
    """

    config: type[Any]
    encode: Callable[[str, torch.Tensor, Any], Encoded] | None = None
    of_spectrum: Callable[[str, Spectrum, torch.Tensor, Any], Encoded] | None = None


METHODS: dict[str, Method] = {
    "impart": Method(ImPartConfig, of_spectrum=encode_impart),
    "impart-qt": Method(ImPartQtConfig, of_spectrum=encode_impart_qt),
    "lowrank": Method(LowRankConfig, of_spectrum=encode_lowrank),
    "dare": Method(DareConfig, encode_dare),
    "bitdelta": Method(BitDeltaConfig, encode_bitdelta),
}


def encode_projection(name: str, delta: torch.Tensor, configs: Sequence[Config]) -> list[Encoded]:
    """The records of one projection, one per settings; a zero delta stores nothing. It is decomposed at most once."""
    if not delta.any():
        return [Encoded(name, "zero", (delta.shape[0], delta.shape[1]))] * len(configs)
    spectrum: Spectrum | None = None
    found = []
    for config in configs:
        method = METHODS[config.method]
        if method.encode is not None:
            found.append(method.encode(name, delta, config))
        if method.of_spectrum is not None:
            spectrum = spectrum or decompose(delta)
            found.append(method.of_spectrum(name, spectrum, delta, config))
    return found
