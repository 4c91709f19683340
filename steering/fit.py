"""From a collection and SAEs to a profile: which latents stand for which source, their targets, and the conflict probe.

Section 3.2 of the SpARE paper. The defaults mask latents that hardly ever fire and take 10 % of the mutual information;
`EXACT` are the choices of the authors' code for Llama.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from steering.collected import Collected, Samples
from steering.conflict import FittedProbe, fit_probe
from steering.edits import Direction
from steering.errors import FitError, SAEMismatchError, SteeringError
from steering.formats import load_sae
from steering.header import DirectionHeader, LayerHeader, ProbeHeader, ProfileHeader, Scalar, file_sha256
from steering.latents import LatentRows
from steering.profile import LayerSelection, write_profile
from steering.prompts import template_sha256
from steering.sae import SAE
from steering.spare import Estimator, expectation, mutual_information, select, targets

MIN_PER_CLASS, WARN_PER_CLASS = 16, 64
_KNN_FROM = 20_000  # samples; below, the binned estimate is as good and much cheaper
_CHUNK = 8192  # latents at a time


@dataclass(frozen=True)
class FitSettings:
    """`estimator` None chooses by the number of samples. `weights` "losses" weighs the targets as the authors do.

    `probe_layer` None takes the best layer before the first edited one. `directions`: layers and strength of a direction, where
    they differ from all layers and `strength`.
    """

    estimator: Estimator | None = None
    mask_dead: bool = True
    share: float = 0.10
    strength: float = 2.0
    weights: Literal["uniform", "losses"] = "uniform"
    seed: int = 0
    probe_layer: int | None = None
    directions: Mapping[Direction, tuple[tuple[int, ...], float]] | None = None


EXACT = FitSettings(estimator="knn", mask_dead=False, share=0.07, weights="losses")


@dataclass(frozen=True)
class LatentStatistics:
    """What a selection is made from, for every latent [n] of a layer: MI (nats), expectation, and the mean targets."""

    mi: torch.Tensor
    expectation: torch.Tensor
    z_context: torch.Tensor
    z_parameter: torch.Tensor


@dataclass(frozen=True)
class Fitted:
    """What was written, and what a user should know about it."""

    header: ProfileHeader
    warnings: tuple[str, ...]


def open_layer_sae(path: Path, layer: int) -> SAE:
    """An SAE given for a layer. Raises SAEFormatError, or SAEMismatchError when it reads another layer."""
    sae = load_sae(path)
    if sae.hook.layer != layer:
        raise SAEMismatchError(f"{path} reads layer {sae.hook.layer}, it is given for layer {layer}")
    return sae


def statistics(samples: Samples, sae: SAE, settings: FitSettings) -> LatentStatistics:
    """Statistics of all latents on the samples, some thousand latents at a time. Raises FitError, SAEMismatchError."""
    if samples.h.shape[1] != sae.d_in:
        raise SAEMismatchError(f"the SAE reads streams of width {sae.d_in}, those collected have {samples.h.shape[1]}")
    estimator = _estimator(settings, samples)
    weighted = settings.weights == "losses"
    losses = (samples.conflict_losses, samples.original_losses) if weighted else (None, None)
    parts = []
    for first in range(0, sae.d_sae, _CHUNK):
        z = sae.rows(range(first, min(first + _CHUNK, sae.d_sae))).latents(samples.h)
        mi = mutual_information(z, samples.labels, settings.seed, estimator, settings.mask_dead)
        parts.append((mi, expectation(z, samples.labels), *targets(z, samples.labels, *losses)))
    return LatentStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


def selection(found: LatentStatistics, sae: SAE, share: float) -> LayerSelection:
    """The latents that hold `share` of the mutual information, and their targets. Raises FitError."""
    context, parameter = select(found.mi, found.expectation, share)
    return LayerSelection(
        _rows(sae, context), _rows(sae, parameter), found.z_context[context], found.z_parameter[parameter]
    )


def fit(
    collected: Collected,
    saes: Mapping[int, Path],
    out: Path,
    settings: FitSettings | None = None,
    base_fingerprint: str | None = None,
) -> Fitted:
    """Fit and write a profile. `base_fingerprint` None takes it from the SAEs, where training left it.

    Raises FitError for too few samples, SAEMismatchError, SAEFormatError, SteeringError for layers that were not collected.
    """
    settings = settings or FitSettings()
    if not saes:
        raise FitError("give at least one SAE: --sae LAYER=PATH")
    layers = sorted(saes)
    directions = _checked_directions(settings, layers)
    first = collected.samples(layers[0])
    warnings = _counts_warning(first)
    chosen: dict[int, LayerSelection] = {}
    headers: dict[int, LayerHeader] = {}
    fingerprints: set[str] = set() if base_fingerprint is None else {base_fingerprint}
    for layer in tqdm(layers, desc="fitting", unit="layer"):
        sae = open_layer_sae(saes[layer], layer)
        if isinstance(known := sae.metadata.get("base_fingerprint"), str):
            fingerprints.add(known)
        samples = collected.samples(layer)
        chosen[layer] = selection(statistics(samples, sae, settings), sae, settings.share)
        headers[layer] = LayerHeader(
            sae_sha256=sae_sha256(saes[layer]),
            input_norm=sae.input_norm,
            n_context=len(chosen[layer].z_context),
            n_parameter=len(chosen[layer].z_parameter),
        )
    probe, probe_warning = best_probe(
        collected, min(min(edited) for edited, _ in directions.values()), settings.probe_layer
    )
    header = ProfileHeader(
        base_fingerprint=_one_fingerprint(fingerprints),
        model_name=Path(collected.settings.model).name,
        template_sha256=template_sha256(),
        d_in=first.h.shape[1],
        directions={
            name: DirectionHeader(layers=edited, strength=strength) for name, (edited, strength) in directions.items()
        },
        layers=headers,
        fit=_record(settings, collected, first),
        probe=_probe_header(probe),
    )
    write_profile(out, header, chosen, None if probe is None else probe.probe)
    return Fitted(header, (*warnings, *probe_warning))


def best_probe(
    collected: Collected, first_edited: int, wanted: int | None = None
) -> tuple[FittedProbe | None, tuple[str, ...]]:
    """The conflict probe of layer `wanted`, or with the best held-out AUROC of those before the first edited one; warnings.

    Before, because a policy that chooses an edit by the score must know it before the edit. Where every layer is edited, all layers
    are candidates.
    """
    all_layers = collected.probe_layers()
    candidates = [layer for layer in all_layers if layer < first_edited] if wanted is None else [wanted]
    warnings = []
    if not candidates:
        candidates = all_layers
    if min(candidates) >= first_edited:
        warnings.append("the probe's layer is not before the first edited one: it cannot decide about the edit")
    try:
        fitted = [probe_of(collected, layer) for layer in candidates]
    except FitError as error:
        return None, (*warnings, f"no conflict probe: {error}")
    return max(fitted, key=lambda one: one.auroc), tuple(warnings)


def probe_of(collected: Collected, layer: int) -> FittedProbe:
    """The conflict probe of one layer. Raises FitError."""
    samples = collected.probe_samples(layer)
    return fit_probe(samples.h, samples.labels, samples.groups, layer=layer)


def sae_sha256(path: Path) -> str:
    """Names an SAE in a profile: sha256 of its file, or of the names and sha256 of its folder's files."""
    if path.is_file():
        return file_sha256(path)
    lines = [
        f"{one.name} {sae_sha256(one)}"
        for one in sorted(path.iterdir())
        if one.suffix in (".json", ".safetensors", ".npz")
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _rows(sae: SAE, ids: Sequence[int]) -> LatentRows:
    """Latents as a profile stores them: rows rounded to bf16, so that what is measured is what is served."""
    rows = sae.rows(ids)
    return replace(rows, encoder=rows.encoder.bfloat16().float(), decoder=rows.decoder.bfloat16().float())


def _estimator(settings: FitSettings, samples: Samples) -> Estimator:
    return settings.estimator or ("binned" if len(samples.labels) < _KNN_FROM else "knn")


def _counts(samples: Samples) -> tuple[int, int]:
    """How many samples were answered from the context, and from memory."""
    context = int((samples.labels == 1).sum())
    return context, len(samples.labels) - context


def _counts_warning(samples: Samples) -> tuple[str, ...]:
    fewest, name = min(zip(_counts(samples), ("context", "memory"), strict=True), key=lambda item: item[0])
    if fewest < MIN_PER_CLASS:
        raise FitError(f"only {fewest} samples were answered from {name}; at least {MIN_PER_CLASS} are needed")
    if fewest < WARN_PER_CLASS:
        return (f"only {fewest} samples were answered from {name}; {WARN_PER_CLASS} or more are advised",)
    return ()


def _one_fingerprint(found: set[str]) -> str:
    if len(found) == 1:
        return next(iter(found))
    if not found:
        raise SteeringError(
            "the SAEs do not say their base; give --base-fingerprint (as `deltaworks delta inspect` prints it)"
        )
    raise SAEMismatchError(f"the SAEs and --base-fingerprint name different bases: {', '.join(sorted(found))}")


def _checked_directions(settings: FitSettings, layers: Sequence[int]) -> dict[Direction, tuple[tuple[int, ...], float]]:
    """Layers and strength by direction. Raises FitError."""
    everywhere = (tuple(layers), settings.strength)
    wanted: dict[Direction, tuple[tuple[int, ...], float]] = {"use_context": everywhere, "use_parameter": everywhere}
    wanted |= settings.directions or {}
    for name, (edited, strength) in wanted.items():
        if missing := set(edited) - set(layers):
            raise FitError(f"direction {name} edits layer {min(missing)}, for which no SAE is given")
        if not edited or not (math.isfinite(strength) and strength > 0):
            raise FitError(f"direction {name} needs a layer and a strength above 0, not {list(edited)} and {strength}")
    return wanted


def _record(settings: FitSettings, collected: Collected, samples: Samples) -> dict[str, Scalar]:
    context, memory = _counts(samples)
    return {
        "estimator": _estimator(settings, samples),
        "mask_dead": settings.mask_dead,
        "share": settings.share,
        "weights": settings.weights,
        "seed": settings.seed,
        "facts": collected.settings.facts,
        "demonstrations": collected.settings.demonstrations,
        "samples_context": context,
        "samples_memory": memory,
    }


def _probe_header(found: FittedProbe | None) -> ProbeHeader | None:
    if found is None:
        return None
    return ProbeHeader(
        layer=found.probe.layer,
        threshold=found.threshold,
        auroc=found.auroc,
        accuracy=found.accuracy,
        n=found.n,
    )
