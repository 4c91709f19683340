"""Label rows: what a question's answers without and with tools were, and the features of every stage. One JSON object a line."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from steering.errors import LabelError
from steering.gate.features import GATEABLE, Kind
from steering.gate.policy import Count, ProbeSettings, Share, canonical_json
from steering.gate.schema import ModelT, Strict, near, parse
from steering.gate.signals import FEATURES, Probe, StageName


class LabelModel(Strict):
    """What answered. None is not known, for `delta_digest` also: the base itself."""

    name: str = ""
    base_fingerprint: str | None = None
    delta_digest: str | None = None
    template_sha256: str | None = None


class LabelRow(Strict):
    """`p_known`, `p_with`: shares of the sampled answers that are right without and with tools.

    `correct_without`, `correct_with`, `called` are of one greedy run each way (SMART); `m` counts the calls of gateable tools in
    the rollouts, the greedy one first; `n` is the fewest calls of a right answer, 0 where one without tools was right
    (OTC), None where none was. `tokens`: completion tokens that each probe took. `propensity`: the probability that
    a live request of this kind came into the file.
    """

    schema_version: Literal[1] = 1
    id: Annotated[str, Field(min_length=1)]
    question: str = ""
    kinds: dict[str, Kind]
    features: dict[StageName, dict[str, float]]
    tokens: dict[Probe, Count] = Field(default_factory=dict)
    p_known: Share
    correct_without: bool
    correct_with: bool
    called: bool
    p_with: Share | None = None
    n: Count | None = None
    m: tuple[Count, ...] = ()
    answers_without: tuple[str, ...] = ()
    answers_with: tuple[str, ...] = ()
    propensity: Annotated[float, Field(gt=0, le=1)] = 1.0
    probes: ProbeSettings | None = None
    model: LabelModel = LabelModel()

    @property
    def gateable(self) -> bool:
        return any(kind in GATEABLE for kind in self.kinds.values())

    @property
    def calls(self) -> int:
        """Of gateable tools in the greedy run."""
        return self.m[0] if self.m else int(self.called)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if "static" not in self.features:
            raise ValueError("features.static: Field required")
        for stage, values in self.features.items():
            known = FEATURES[stage]
            for name in values:
                if name not in known:
                    raise ValueError(f"features.{stage}: unknown feature {name!r}, {near(name, list(known))}")
            missing = [name for name in known if name not in values]
            if missing:
                raise ValueError(f"features.{stage}: {missing[0]} is missing")
            if stage != "static" and stage not in self.tokens:
                raise ValueError(f"tokens: {stage} is missing")
        if len(self.features) > 1 and self.probes is None:
            raise ValueError("probes: how the features were asked for is missing")
        if self.m and self.called != (self.m[0] > 0):
            raise ValueError("called contradicts m, whose first number is of the greedy run")
        return self


@dataclass(frozen=True)
class Labels:
    rows: tuple[LabelRow, ...]
    sha256: str


def read_labels(path: Path) -> Labels:
    """Raises LabelError that names the line."""
    rows = read_lines(path, LabelRow)
    content = path.read_bytes()
    return Labels(tuple(rows), hashlib.sha256(content).hexdigest())


def read_lines(path: Path, kind: type[ModelT]) -> list[ModelT]:
    """Rows with an `id` that stands there once; empty lines are skipped. Raises LabelError that names the line."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise LabelError(f"cannot read {path}: {error.strerror}") from error
    rows: list[ModelT] = []
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse(kind, line)
            identifier = str(getattr(row, "id"))  # noqa: B009  # every kind of row has one
            if identifier in first:
                raise ValueError(f"id: {identifier!r} stands in line {first[identifier]} as well")
        except ValueError as error:
            raise LabelError(f"{path}, line {number}: {error}") from error
        first[identifier] = number
        rows.append(row)
    if not rows:
        raise LabelError(f"{path} holds no row")
    return rows


def row_line(row: LabelRow) -> bytes:
    return canonical_json(row.model_dump(mode="json")) + b"\n"


def same_settings(rows: Sequence[LabelRow]) -> ProbeSettings | None:
    """How the probes were asked; None where no row has a probe. Raises LabelError where rows differ."""
    found = list(dict.fromkeys(row.probes for row in rows if row.probes is not None))
    if len(found) > 1:
        raise LabelError(f"rows were asked in different ways: {found[0]} and {found[1]}")
    return found[0] if found else None


def same_model(rows: Sequence[LabelRow]) -> LabelModel:
    """Raises LabelError where rows are of different models."""
    found = list(dict.fromkeys(row.model for row in rows))
    if len(found) > 1:
        raise LabelError(f"rows are of different models: {found[0]} and {found[1]}")
    return found[0]
