"""Every compression method, as a literal table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from compressors.baselines import BitDeltaConfig, DareConfig, LowRankConfig, encode_bitdelta, encode_dare
from compressors.encode import encode_impart, encode_lowrank
from compressors.impart import ImPartConfig
from compressors.quantize import ImPartQtConfig, encode_impart_qt
from compressors.record import Encoded

Config = ImPartConfig | ImPartQtConfig | LowRankConfig | DareConfig | BitDeltaConfig


@dataclass(frozen=True)
class Method:
    """Settings, and what makes a record of (name, delta [out, in] in fp32 and not all zero, settings)."""

    config: type[Any]
    encode: Callable[[str, torch.Tensor, Any], Encoded]


METHODS: dict[str, Method] = {
    "impart": Method(ImPartConfig, encode_impart),
    "impart-qt": Method(ImPartQtConfig, encode_impart_qt),
    "lowrank": Method(LowRankConfig, encode_lowrank),
    "dare": Method(DareConfig, encode_dare),
    "bitdelta": Method(BitDeltaConfig, encode_bitdelta),
}


def encode_projection(name: str, delta: torch.Tensor, config: Config) -> Encoded:
    """The record of one projection; a zero delta stores nothing."""
    if not delta.any():
        return Encoded(name, "zero", (delta.shape[0], delta.shape[1]))
    return METHODS[config.method].encode(name, delta, config)
