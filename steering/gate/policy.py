"""A tool-gate policy: one JSON file, bound to a base, a delta and a chat template. Nothing in it is executed.

The file is canonical JSON, so that its sha256 is the policy's id; a file that was formatted by hand keeps the id.
"""

from __future__ import annotations

import hashlib
import json
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from steering.errors import PolicyError
from steering.gate.features import GATEABLE, GateableKind, Kind
from steering.gate.schema import Strict, near, parse
from steering.gate.signals import FEATURES, STAGES, Probe, Scale, StageName

SuppressMode = Literal["drop_tools", "tool_choice_none", "answer_from_draft"]
Mixed = Literal["narrow", "allow"]
Placement = Literal["pre", "post"]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]

_MAX_BYTES = 4 << 20


class Binding(Strict):
    """The model that the policy was fitted for. `delta_digest` None is the base itself; `name` is for people."""

    name: str = ""
    base_fingerprint: Annotated[str, Field(min_length=1)]
    delta_digest: Annotated[str, Field(min_length=1)] | None
    template_sha256: str


class ToolRule(Strict):
    """Tools whose name matches a pattern (`*`, `?`, `[abc]`; case counts) are of a kind; the first match decides."""

    match: Annotated[str, Field(min_length=1)]
    kind: Kind
    gateable: bool | None = None

    @model_validator(mode="after")
    def _only_knowledge(self) -> Self:
        if self.gateable and self.kind not in GATEABLE:
            raise ValueError(f"gateable: tools of kind {self.kind!r} are never withheld, only lookup and compute")
        return self


class Feature(Strict):
    """`mean` and `std` are of the value on its `scale` (signals.py)."""

    name: str
    mean: float
    std: Annotated[float, Field(gt=0)]
    scale: Scale = "linear"


class Logistic(Strict):
    weights: tuple[float, ...]
    bias: float


class Isotonic(Strict):
    """Calibrated probability `y` at the logistic model's probability `x`; linear between, constant outside."""

    x: tuple[Share, ...] = Field(min_length=1)
    y: tuple[Share, ...]

    @model_validator(mode="after")
    def _monotone(self) -> Self:
        if len(self.x) != len(self.y):
            raise ValueError(f"y has {len(self.y)} values, x has {len(self.x)}")
        if any(b <= a for a, b in pairwise(self.x)):
            raise ValueError("x must rise strictly")
        if any(b < a for a, b in pairwise(self.y)):
            raise ValueError("y must not fall")
        return self


class Stage(Strict):
    """A calibrated P(right without tools) from what is known so far. A score outside [lo, hi] decides at once."""

    name: StageName
    features: tuple[Feature, ...] = Field(min_length=1)
    logistic: Logistic
    isotonic: Isotonic
    lo: Share
    hi: Share

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [feature.name for feature in self.features]
        if len(set(names)) != len(names):
            raise ValueError("features: a name stands there twice")
        if len(self.logistic.weights) != len(names):
            raise ValueError(f"logistic.weights: {len(self.logistic.weights)} values for {len(names)} features")
        if self.lo > self.hi:
            raise ValueError("lo is above hi")
        return self


class Thresholds(Strict):
    """`suppress` None: never. `require` None: no caller can have a tool call required."""

    suppress: Share | None
    require: Share | None = None

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.suppress is not None and self.require is not None and self.require >= self.suppress:
            raise ValueError("require must be below suppress")
        return self


class ProbeSettings(Strict):
    """How a model is asked; labels and policy must agree in it. `max_tokens` is of a draft and of each sample."""

    k: Annotated[int, Field(ge=1, le=64)] = 5
    temperature: Annotated[float, Field(gt=0, le=2)] = 0.7
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    top_logprobs: Annotated[int, Field(ge=1, le=20)] = 5
    call_marker: Annotated[str, Field(min_length=1)] = "<tool_call>"

    def most_tokens(self, probe: str) -> int:
        """Completion tokens that a probe can take."""
        return {"draft": self.max_tokens, "samples": self.k * self.max_tokens}.get(probe, 1)


class Probes(ProbeSettings):
    """`order`: of the probes; a stage of a probe's name is scored after it. `max_probe_tokens` are completion tokens.

    `hidden_profile`: SHA-256 of the steering profile whose probe `hidden` reads; a server that has none cannot ask it.
    """

    order: tuple[Probe, ...] = ()
    max_probe_tokens: Count = 512
    timeout_ms: Annotated[int, Field(gt=0)] = 2000
    hidden_profile: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if len(set(self.order)) != len(self.order):
            raise ValueError("order: a probe stands there twice")
        if "ptrue" in self.order and "draft" not in self.order[: self.order.index("ptrue")]:
            raise ValueError("order: ptrue needs draft before it")
        return self


class Evaluation(Strict):
    """The policy on the questions that its threshold was chosen on; `harm_ucb` holds with confidence 1 - delta."""

    n: Count
    alpha: Share
    beta: Share | None
    overuse_before: Share
    overuse_after: Share
    accuracy_before: Share
    accuracy_after: Share
    harm: Share
    harm_ucb: Share | None
    epsilon: Share
    delta: Share


def _is_narrow(mixed: str) -> bool:
    return mixed == "narrow"


class Policy(Strict):
    """`mixed`: requests with tools of other kinds too lose the gateable ones ("narrow"), or no score acts on them ("allow")."""

    schema_version: Literal[1] = 1
    model: Binding
    tool_kinds: tuple[ToolRule, ...] = ()
    budgets: dict[GateableKind, Count] = Field(default_factory=dict)
    stages: tuple[Stage, ...] = Field(min_length=1)
    thresholds: Thresholds
    probes: Probes = Probes()
    suppress_mode: SuppressMode = "drop_tools"
    mixed: Mixed = Field(default="narrow", exclude_if=_is_narrow)  # left out so that older policies keep their id
    placement: Placement = "pre"
    explore: Share = 0.0
    eval: Evaluation | None = None
    data_sha256: str = ""

    @cached_property
    def policy_id(self) -> str:
        return hashlib.sha256(policy_bytes(self)).hexdigest()

    def kind_of(self, name: str) -> tuple[Kind, bool]:
        """Kind of a tool, and whether it may be withheld."""
        rule = next((rule for rule in self.tool_kinds if fnmatchcase(name, rule.match)), None)
        if rule is None:
            return "unknown", False
        return rule.kind, rule.kind in GATEABLE and rule.gateable is not False

    @model_validator(mode="after")
    def _a_cascade(self) -> Self:
        names = [stage.name for stage in self.stages]
        places = ("static", *self.probes.order)
        for index, name in enumerate(names):
            if name not in places:
                raise ValueError(f"stages.{index}.name: {name} is not in probes.order")
        if [name for name in places if name in names] != names:
            raise ValueError(f"stages: {', '.join(names)} are not in the order static, {', '.join(self.probes.order)}")
        if self.probes.order and names[-1] != self.probes.order[-1]:
            raise ValueError(f"probes.order: {self.probes.order[-1]} is asked, and no stage uses it")
        for index, stage in enumerate(self.stages):
            self._check_stage(f"stages.{index}", stage, places[: places.index(stage.name) + 1])
        if self.suppress_mode == "answer_from_draft" and "draft" not in self.probes.order:
            raise ValueError("suppress_mode: answer_from_draft needs draft in probes.order")
        return self

    def _check_stage(self, where: str, stage: Stage, known: tuple[str, ...]) -> None:
        usable = [name for place in known for name in FEATURES[place]]
        every = [name for place in STAGES for name in FEATURES[place]]
        for index, feature in enumerate(stage.features):
            if feature.name not in every:
                raise ValueError(
                    f"{where}.features.{index}.name: unknown feature {feature.name!r}, {near(feature.name, usable)}"
                )
            if feature.name not in usable:
                raise ValueError(f"{where}.features.{index}.name: {feature.name} is not known yet at this stage")
        tau = self.thresholds.suppress
        if tau is not None and not stage.lo <= tau <= stage.hi:
            raise ValueError(f"{where}: thresholds.suppress {tau:g} is outside lo {stage.lo:g} to hi {stage.hi:g}")


def read_policy(source: bytes | Path) -> Policy:
    """Raises PolicyError that names the field."""
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
        if len(content) > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes")
        return parse(Policy, content)
    except (OSError, ValueError) as error:
        raise PolicyError(f"the file is not a tool-gate policy: {error}") from error


def policy_bytes(policy: Policy) -> bytes:
    """Canonical JSON: sorted keys, no spaces, every default written out."""
    return canonical_json(policy.model_dump(mode="json"))


def canonical_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def write_policy(policy: Policy, path: Path) -> None:
    path.write_bytes(policy_bytes(policy))


def mismatch(policy: Policy, base_fingerprint: str, delta_digest: str | None, template_sha256: str) -> str | None:
    """Why a policy does not hold for what is served, or None."""
    bound = policy.model
    for what, fitted, served in (
        ("base", bound.base_fingerprint, base_fingerprint),
        ("delta", bound.delta_digest, delta_digest),
        ("chat template", bound.template_sha256, template_sha256),
    ):
        if fitted != served:
            return f"the policy was fitted for {what} {fitted or 'none'}, served is {served or 'none'}"
    return None
