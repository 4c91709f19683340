"""Random SAEs and profiles of the tiny model, edits made of them, and the oracle: transformers with a hook on edited layers."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from server.engine.base import EngineEdit
from steering.conflict import Probe
from steering.edits import EditTable, feature_table
from steering.formats import open_sae, pack_sae
from steering.header import DirectionHeader, LayerHeader, ProbeHeader, ProfileHeader
from steering.latents import LatentRows
from steering.profile import LayerSelection, Profile, write_profile
from steering.sae import SAE, Hook
from tests.engine.bed import Answer

WIDTH, LATENTS = 128, 64
LAYERS = {"use_context": (0, 1), "use_parameter": (1, 2)}
PROBE_LAYER = 0


def write_random_profile(
    path: Path, seed: int = 3, width: int = WIDTH, probe: bool = True, probe_layer: int = PROBE_LAYER
) -> Path:
    """Sixteen latents for each side in each of three layers, strong enough to change what a random model says."""
    random = torch.Generator().manual_seed(seed)
    layers = {layer: _selection(random, width) for layer in range(3)}
    weight = torch.randn(width, generator=random)
    found = Probe(probe_layer, 0.1 * weight, torch.zeros(1), torch.zeros(width), 0.1 * torch.ones(width))
    header = ProfileHeader(
        base_fingerprint="tiny",
        model_name="tiny",
        template_sha256="",
        d_in=width,
        directions={name: DirectionHeader(layers=chosen, strength=2.0) for name, chosen in LAYERS.items()},
        layers={layer: LayerHeader(sae_sha256="", n_context=16, n_parameter=16) for layer in layers},
        probe=ProbeHeader(layer=probe_layer, auroc=0.9, accuracy=0.9, n=10) if probe else None,
    )
    write_profile(path, header, layers, found if probe else None)
    return path


def _selection(random: torch.Generator, width: int) -> LayerSelection:
    def rows() -> LatentRows:
        decoder = torch.randn(16, width, generator=random)
        return LatentRows(
            torch.arange(16),
            torch.randn(16, width, generator=random),
            0.1 * torch.randn(16, generator=random),
            0.1 * torch.rand(16, generator=random),
            decoder / decoder.norm(dim=1, keepdim=True),
        )

    return LayerSelection(rows(), rows(), torch.rand(16, generator=random), torch.rand(16, generator=random))


def write_random_sae(path: Path, layer: int, seed: int = 5) -> Path:
    random = torch.Generator().manual_seed(seed + layer)
    decoder = torch.randn(LATENTS, WIDTH, generator=random)
    sae = SAE(
        w_enc=torch.randn(WIDTH, LATENTS, generator=random),
        b_enc=torch.zeros(LATENTS),
        w_dec=decoder / decoder.norm(dim=1, keepdim=True),
        b_dec=0.1 * torch.randn(WIDTH, generator=random),
        architecture="jumprelu",
        threshold=0.1 * torch.rand(LATENTS, generator=random),
        hook=Hook(layer),
        model_name="tiny",
    )
    pack_sae(sae, path)
    return path


@dataclass(frozen=True)
class Edits:
    """Makes edits of the files of one folder."""

    folder: Path

    def profile(self, direction: str, strength: float = 2.0, mode: str = "targets") -> dict[str, Any]:
        path = self.folder / "profile.safetensors"
        found = {"path": str(path), "digest": "p" * 64}
        return {"profile": found, "direction": direction, "strength": strength, "mode": mode, "layers": None}

    def sae(self, layer: int, *features: tuple[int, str, float]) -> dict[str, Any]:
        found = {"path": str(self.folder / f"sae-{layer}.safetensors"), "digest": f"{layer}" * 64}
        entries = [{"id": latent, "op": op, "value": value} for latent, op, value in features]
        return {"sae": found, "layer": layer, "features": entries}

    def probe(self) -> dict[str, str]:
        return {"path": str(self.folder / "profile.safetensors"), "digest": "p" * 64}


def edit(
    *tables: dict[str, Any],
    prompt: object = "last",
    generation: object = None,
    probe: dict[str, str] | None = None,
    at_least: float | None = None,
) -> EngineEdit:
    condition = None if at_least is None else {"at_least": at_least}
    spec = {"tables": tables, "prompt": prompt, "generation": generation, "probe": probe, "condition": condition}
    text = json.dumps(spec, sort_keys=True)
    return EngineEdit(hashlib.sha256(text.encode()).hexdigest(), text)


def tables_of(made: EngineEdit) -> dict[int, list[EditTable]]:
    found: dict[int, list[EditTable]] = {}
    for entry in json.loads(made.spec)["tables"]:
        if "profile" in entry:
            profile = Profile.open(Path(entry["profile"]["path"]))
            tables = profile.tables(entry["direction"], entry["strength"], entry["mode"])
        else:
            features = [(feature["id"], feature["op"], feature["value"]) for feature in entry["features"]]
            tables = {entry["layer"]: feature_table(open_sae(Path(entry["sae"]["path"])), features)}
        for layer, table in tables.items():
            found.setdefault(layer, []).append(table)
    return found


def edited_positions(spec: dict[str, Any], prompt_length: int, length: int) -> list[int]:
    """Positions below `length` that a spec edits: a plain second reading of the contract, by list indexing."""
    prompt, generation = list(range(prompt_length)), list(range(prompt_length, length))
    found: Sequence[int] = []
    if spec["prompt"] == "last":
        found = prompt[-1:]
    elif spec["prompt"] == "all":
        found = prompt
    elif spec["prompt"] and "positions" in spec["prompt"]:
        found = [prompt[position] for position in spec["prompt"]["positions"]]
    elif spec["prompt"]:
        found = prompt[slice(*spec["prompt"]["window"])]
    steps: Sequence[int] = []
    if spec["generation"] == "all":
        steps = generation
    elif spec["generation"]:
        steps = generation[slice(*spec["generation"]["window"])]
    return sorted({*found, *steps})


class Oracle:
    """Greedy decoding without a cache; the hooks change the chosen rows of a layer's output on every pass."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    @classmethod
    def of(cls, base: Path) -> "Oracle":
        return cls(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))

    @torch.no_grad()
    def answer(self, prompt: tuple[int, ...], made: EngineEdit | None, count: int) -> Answer:
        spec = json.loads(made.spec) if made else None
        tables = tables_of(made) if made else {}
        ids, logprobs, positions = list(prompt), [], []

        def hook(layer: int) -> Any:
            def change(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
                rows = output[0, positions]
                changed = output.clone()
                changed[0, positions] = rows + sum(table.delta(rows) for table in tables[layer])
                return changed

            return change

        handles = [self.model.model.layers[layer].register_forward_hook(hook(layer)) for layer in tables]
        for _ in range(count):
            positions[:] = edited_positions(spec, len(prompt), len(ids)) if spec else []
            scores = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
        for handle in handles:
            handle.remove()
        return Answer(tuple(ids[len(prompt) :]), tuple(logprobs), 0)

    @torch.no_grad()
    def stream(self, prompt: tuple[int, ...], layer: int) -> torch.Tensor:
        """Unedited stream after `layer` at every position [T, d]."""
        found: list[torch.Tensor] = []
        handle = self.model.model.layers[layer].register_forward_hook(lambda *call: found.append(call[2][0]))
        self.model(torch.tensor([prompt]))
        handle.remove()
        return found[0]
