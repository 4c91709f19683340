"""A folder of labelled hidden states, as `deltaworks steer collect` writes it.

    settings.json              what was asked for; a folder is gone on with only under the same settings
    facts.jsonl                the facts, so that nothing else is needed later
    memorised.json             the model's closed-book answers, and the split into pool and test groups
    shards/<style>-k<k>-s<seed>.safetensors
                               states.<L> [n, d] fp32, labels [n] int8 (1 context, 0 memory), conflict_losses, original_losses [n]
    probe.safetensors          states.<L> [m, d] fp32, labels [m] int8 (1: the document contradicts what is memorised)

Metadata of a shard holds its rows' groups and predictions as JSON. A file is written whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from steering.errors import SteeringError
from steering.facts import Fact
from steering.prompts import Split


@dataclass(frozen=True)
class CollectSettings:
    """What decides a collection's content. `demonstrations`: "shared" draws them once per seed and number of shots, so that prompts
    share their beginning and cost a fifth; "per-item" draws them for every item, as the authors do. `same_category`: an item is
    asked after solved items of its own category, where the facts have categories."""

    model: str
    facts: str
    layers: tuple[int, ...]
    pool: int = 128
    shots: tuple[int, ...] = (3, 4, 5)
    seeds: tuple[int, ...] = (42, 43, 44, 45, 46)
    styles: tuple[str, ...] = ("dss", "dso", "doo")
    demonstrations: str = "shared"
    same_category: bool = True
    limit: int | None = None
    probe_items: int = 640
    fact_seed: int = 42


@dataclass(frozen=True)
class Known:
    """`answers`: the closed-book answer to every fact; `memorised`: whether it is right; both in the order of the facts."""

    answers: tuple[str, ...]
    memorised: tuple[bool, ...]
    split: Split


@dataclass(frozen=True)
class Samples:
    """N prompts under a contradicting document. `h` [N, d] fp32 is the stream at the last prompt position of one layer."""

    h: torch.Tensor
    labels: torch.Tensor
    conflict_losses: torch.Tensor
    original_losses: torch.Tensor
    groups: tuple[str, ...]


@dataclass(frozen=True)
class ProbeSamples:
    """M prompts, half of them under a contradicting document (label 1) and half under a true one (label 0)."""

    h: torch.Tensor
    labels: torch.Tensor
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Collected:
    """A finished collection."""

    folder: Path
    settings: CollectSettings
    facts: tuple[Fact, ...]
    known: Known

    @classmethod
    def open(cls, folder: Path) -> Collected:
        """Raises SteeringError for a folder that is no collection, or an unfinished one."""
        settings = read_settings(folder)
        if settings is None:
            raise SteeringError(f"{folder} holds no collection; make one with: deltaworks steer collect")
        missing = [path for path in [folder / "memorised.json", probe_file(folder)] if not path.is_file()]
        missing += [path for path in shard_files(folder, settings) if not path.is_file()]
        if missing:
            raise SteeringError(
                f"{folder} is unfinished, {missing[0].name} is missing; go on with the same `deltaworks steer collect`"
            )
        return cls(folder, settings, tuple(read_facts(folder)), read_known(folder))

    def samples(self, layer: int) -> Samples:
        """Raises SteeringError for a layer that was not collected, or no labelled sample."""
        if layer not in self.settings.layers:
            raise SteeringError(f"layer {layer} was not collected; {self.folder} holds {list(self.settings.layers)}")
        names = (f"states.{layer}", "labels", "conflict_losses", "original_losses")
        parts = [_read(path, names) for path in shard_files(self.folder, self.settings)]
        h, labels, conflict, original = (torch.cat([tensors[name] for tensors, _ in parts]) for name in names)
        if len(labels) == 0:
            raise SteeringError(
                f"{self.folder} holds no labelled sample: the model answered neither from context nor memory"
            )
        groups = tuple(group for _, rows in parts for group in rows["groups"])
        return Samples(h, labels.long(), conflict, original, groups)

    def probe_samples(self, layer: int) -> ProbeSamples:
        """Raises SteeringError for a layer that was not collected."""
        if layer not in self.probe_layers():
            raise SteeringError(f"{self.folder} has no states of layer {layer} to probe")
        tensors, rows = _read(probe_file(self.folder), (f"states.{layer}", "labels"))
        return ProbeSamples(tensors[f"states.{layer}"], tensors["labels"].long(), tuple(rows["groups"]))

    def probe_layers(self) -> list[int]:
        with safe_open(probe_file(self.folder), "pt") as file:
            names = list(file.keys())
        return sorted(int(name.removeprefix("states.")) for name in names if name.startswith("states."))

    def held_out(self) -> list[Fact]:
        """Facts that the model knows, of groups that are not in the pool."""
        return self._known_of(self.known.split.test)

    def known_pool(self) -> list[Fact]:
        """Facts that the model knows, of the pool's groups."""
        return self._known_of(self.known.split.pool)

    def _known_of(self, names: tuple[str, ...]) -> list[Fact]:
        groups = set(names)
        return [
            fact for fact, right in zip(self.facts, self.known.memorised, strict=True) if right and fact.group in groups
        ]

    def pool(self) -> list[Fact]:
        """All facts of the pool's groups."""
        groups = set(self.known.split.pool)
        return [fact for fact in self.facts if fact.group in groups]

    def counts(self) -> dict[str, dict[str, int]]:
        """By style: how many prompts were answered from the context, from memory and otherwise."""
        found: dict[str, dict[str, int]] = {}
        for path in shard_files(self.folder, self.settings):
            _, rows = _read(path, ())
            of_style = found.setdefault(rows["style"], dict.fromkeys(rows["counts"], 0))
            for name, count in rows["counts"].items():
                of_style[name] += count
        return found


def shard_file(folder: Path, style: str, shots: int, seed: int) -> Path:
    return folder / "shards" / f"{style}-k{shots}-s{seed}.safetensors"


def shard_files(folder: Path, settings: CollectSettings) -> list[Path]:
    return [
        shard_file(folder, style, shots, seed)
        for seed in settings.seeds
        for shots in settings.shots
        for style in settings.styles
    ]


def probe_file(folder: Path) -> Path:
    return folder / "probe.safetensors"


def claim(folder: Path, settings: CollectSettings) -> None:
    """Take a folder for these settings. Raises SteeringError when it holds a collection made with others."""
    present = read_settings(folder)
    if present is not None and present != settings:
        old, new = asdict(present), asdict(settings)
        name = next(name for name in new if old[name] != new[name])
        raise SteeringError(f"{folder} was begun with {name} = {old[name]}, not {new[name]}; use another --out")
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", asdict(settings))


def read_settings(folder: Path) -> CollectSettings | None:
    path = folder / "settings.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return CollectSettings(**_with_tuples(found))
    except (ValueError, TypeError, AttributeError) as error:
        raise SteeringError(f"{path} is damaged ({error}); use another --out") from error


def write_facts(folder: Path, facts: list[Fact]) -> None:
    text = "".join(json.dumps(asdict(fact), ensure_ascii=False) + "\n" for fact in facts)
    _write(folder / "facts.jsonl", text)


def read_facts(folder: Path) -> list[Fact]:
    lines = (folder / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    return [Fact(**_with_tuples(json.loads(line))) for line in lines]


def write_known(folder: Path, known: Known) -> None:
    write_json(folder / "memorised.json", asdict(known))


def read_known(folder: Path) -> Known:
    found = json.loads((folder / "memorised.json").read_text(encoding="utf-8"))
    split = Split(tuple(found["split"]["pool"]), tuple(found["split"]["test"]))
    return Known(tuple(found["answers"]), tuple(found["memorised"]), split)


def write_states(path: Path, tensors: Mapping[str, torch.Tensor], rows: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        temporary,
        metadata={"rows": json.dumps(rows, ensure_ascii=False)},
    )
    temporary.replace(path)


def write_json(path: Path, content: Any) -> None:
    _write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _with_tuples(found: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _read(path: Path, names: Sequence[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The named tensors of a file (one layer of many), and what its metadata says of the rows."""
    try:
        with safe_open(path, "pt") as file:
            rows: dict[str, Any] = json.loads(file.metadata()["rows"])
            return {name: file.get_tensor(name) for name in names}, rows
    except (OSError, SafetensorError) as error:
        raise SteeringError(f"{path} cannot be read: {error}; delete it and collect again") from error
