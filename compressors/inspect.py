"""What a delta file holds, as text for people and as JSON for programs; every figure is counted from the file."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compressors.artifact import Artifact
from compressors.layout import stored_name
from compressors.ratios import recount
from compressors.tokenizer import array_key


@dataclass
class Kind:
    """All records of one kind of parameter, such as `mlp.up_proj impart`."""

    count: int = 0
    nbytes: int = 0
    values: int = 0  # dense
    kept: int = 0
    ranks: list[int] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)


def summary(artifact: Artifact) -> dict[str, Any]:
    """Manifest fields, the three ratios recounted, and a row per kind of parameter."""
    kinds: dict[str, Kind] = defaultdict(Kind)
    for name, record in artifact.records.items():
        kind = kinds[f"{_module(name)} {record.kind}"]
        kind.count += 1
        kind.values += math.prod(record.shape)
        kind.nbytes += sum(artifact.array(f"{name}::{key}").nbytes for key in record.sha256)
        if record.kind == "impart":
            kept = sum(int(artifact.array(f"{name}::keep_{side}").sum(dtype=np.int64)) for side in "uv")
            kind.ranks.append(record.rank)
            kind.densities.append(kept / (record.rank * sum(record.shape)))
    tally = recount(artifact)
    size = artifact.path.stat().st_size
    manifest = artifact.manifest.model_dump(exclude={"tensors", "ratios"})
    ratios = {
        "values": tally.values_ratio,
        "projection_bytes": tally.bytes_ratio,
        "whole_file": round(tally.dense_bytes / size, 2),
    }
    own = sum(artifact.array(array_key(name)).nbytes for name in artifact.manifest.tokenizer.files)
    found = {"ratios": ratios, "kinds": _rows(kinds), "tokenizer_bytes": own}
    return {"file": artifact.path.name, "bytes": size, **manifest, **found}


def _module(name: str) -> str:
    """A parameter's module without the number of its layer or expert: `mlp.up_proj`."""
    words = stored_name(name).removesuffix(".weight").split(".")
    return ".".join([word for word in words if not word.isdigit() and word not in ("model", "layers", "h")][-2:])


def _rows(kinds: dict[str, Kind]) -> list[dict[str, Any]]:
    return [
        {
            "kind": name,
            "tensors": kind.count,
            "bytes": kind.nbytes,
            "dense_values": kind.values,
            "rank": [min(kind.ranks), max(kind.ranks)] if kind.ranks else None,
            "density": round(sum(kind.densities) / len(kind.densities), 3) if kind.densities else None,
        }
        for name, kind in sorted(kinds.items())
    ]


def text(found: dict[str, Any]) -> str:
    """The summary as a page."""
    ratios = found["ratios"]
    lines = [
        f"{found['file']}: {found['bytes']:,} bytes, method {found['method']}, {found['architecture']}",
        f"base       {found['base_name']}  {found['base_fingerprint']}",
        f"settings   {', '.join([*_settings(found), 'masks ' + found['mask']])} (seed {found['seed']})",
        *_merged(found.get("merged")),
        *_tokenizer(found["tokenizer"], found["tokenizer_bytes"]),
        f"ratios     {_x(ratios['values'])} by surviving values, {_x(ratios['projection_bytes'])} by bytes of the projections, "
        f"{_x(ratios['whole_file'])} whole file against the dense fine-tune",
        "",
        f"{'parameters':34} {'tensors':>7} {'bytes':>12} {'rank':>11} {'density':>8}",
    ]
    for row in found["kinds"]:
        rank = "-".join(str(r) for r in dict.fromkeys(row["rank"])) if row["rank"] else ""
        density = "" if row["density"] is None else f"{row['density']:.3f}"
        lines.append(f"{row['kind']:34} {row['tensors']:>7} {row['bytes']:>12,} {rank:>11} {density:>8}")
    return "\n".join(lines)


def _merged(merged: dict[str, Any] | None) -> list[str]:
    """What a merged delta was made of."""
    if merged is None:
        return []
    parts = " + ".join(f"{part['weight']:g} {part['sha256'][:12]}" for part in merged["parts"])
    retain = "" if merged["retain"] is None else f", retain {merged['retain']:g}"
    return [f"merged     {merged['method']}, scale {merged['scale']:g}{retain}: {parts}"]


def _tokenizer(told: dict[str, Any], nbytes: int) -> list[str]:
    """The fine-tune's own tokenizer, where it has one."""
    if not nbytes:
        return []
    return [f"tokenizer  its own: {', '.join(told['files'])} in {nbytes:,} bytes; a vocabulary of {told['vocab_size']}"]


def _settings(found: dict[str, Any]) -> list[str]:
    """Those that the method has."""
    names = ("ratio", "bytes_ratio", "beta", "c", "rule", "value_dtype", "distil")
    told = [(name, found[name]) for name in names if found.get(name) is not None]
    return [f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in told]


def _x(ratio: float | None) -> str:
    return "none" if ratio is None else f"{ratio:g}x"
