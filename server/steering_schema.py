"""The wire models of `steering` and `conflict`: checked for shape and range; names are resolved by steering.py."""

from typing import Annotated, Any, Literal, Self, TypeGuard

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from server.core import (
    ConflictCheck,
    FeatureEdit,
    FeatureSteering,
    GenerationSteps,
    OfMax,
    ProfileSteering,
    PromptPositions,
    SAEEdit,
    SteeringOptions,
    Window,
)
from server.wire import OwnModel, missing_field, wrong_field

MAX_EDITS = 16
MAX_FEATURES = 256
MAX_POSITIONS = 1024
MAX_LAYERS = 256
MAX_VALUE = 1e6  # far above what any latent reaches, far below what overflows fp32
MAX_FACTOR = 100.0  # of a latent's recorded maximum; text falls apart long before
_INDEX = 1 << 31

Name = Annotated[str, Field(min_length=1, max_length=128)]
Strength = Annotated[float, Field(ge=0)]  # the cap is a setting, checked where the profile is resolved
Layers = Annotated[list[Annotated[int, Field(ge=0, lt=_INDEX)]], Field(min_length=1, max_length=MAX_LAYERS)]


def _index(value: object) -> bool:
    return type(value) is int and -_INDEX < value < _INDEX


def _window(value: object) -> Window | None:
    if isinstance(value, list) and len(value) == 2 and _index(value[0]) and (value[1] is None or _index(value[1])):
        return Window(value[0], value[1])
    return None


def _prompt_positions(value: object) -> PromptPositions:
    if value is None or value == "last" or value == "all":
        return value
    if isinstance(value, dict) and value.keys() == {"positions"}:
        found = value["positions"]
        if isinstance(found, list) and 0 < len(found) <= MAX_POSITIONS and all(map(_index, found)):
            return tuple(sorted(set(found)))
    if isinstance(value, dict) and value.keys() == {"window"} and (window := _window(value["window"])):
        return window
    raise PydanticCustomError(
        "prompt_positions", 'give "last", "all", {"positions": [-1]}, {"window": [-5, null]} or null'
    )


def _generation_steps(value: object) -> GenerationSteps:
    if value is None or value == "all":
        return value
    if isinstance(value, dict) and value.keys() == {"window"} and (window := _window(value["window"])):
        if window.start >= 0 and (window.end is None or window.end > window.start):
            return window
        raise PydanticCustomError("generation_steps", "the window needs 0 <= start < end")
    raise PydanticCustomError("generation_steps", 'give "all", {"window": [0, 8]} or null')


def _within(value: object, limit: float) -> TypeGuard[int | float]:
    return type(value) in (int, float) and -limit <= value <= limit  # type: ignore[operator]  # a number; False for NaN


def _latent_value(value: object) -> float | OfMax | None:
    if value is None:
        return None
    if _within(value, MAX_VALUE):
        return float(value)
    if isinstance(value, dict) and value.keys() == {"x_max"} and _within(value["x_max"], MAX_FACTOR):
        return OfMax(float(value["x_max"]))
    raise PydanticCustomError(
        "latent_value", 'give a number from -1e6 to 1e6, or {"x_max": 2} with a factor from -100 to 100'
    )


# What the validators above take, as JSON schemas for the API's document.
_AN_INDEX: dict[str, Any] = {"type": "integer", "exclusiveMinimum": -_INDEX, "exclusiveMaximum": _INDEX}
_A_WINDOW = {
    "type": "array",
    "prefixItems": [_AN_INDEX, {"anyOf": [_AN_INDEX, {"type": "null"}]}],
    "minItems": 2,
    "maxItems": 2,
}
_POSITIONS = {"type": "array", "items": _AN_INDEX, "minItems": 1, "maxItems": MAX_POSITIONS}


def _only(key: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {key: schema}, "required": [key], "additionalProperties": False}


_PROMPT = {"anyOf": [{"enum": ["last", "all", None]}, _only("positions", _POSITIONS), _only("window", _A_WINDOW)]}
_GENERATION = {"anyOf": [{"enum": ["all", None]}, _only("window", _A_WINDOW)]}
_NUMBER = {"type": ["number", "null"], "minimum": -MAX_VALUE, "maximum": MAX_VALUE}
_FACTOR = {"type": "number", "minimum": -MAX_FACTOR, "maximum": MAX_FACTOR}
_VALUE = {"anyOf": [_NUMBER, _only("x_max", _FACTOR)]}


class Apply(OwnModel):
    prompt: Annotated[Any, BeforeValidator(_prompt_positions), WithJsonSchema(_PROMPT)] = "last"
    generation: Annotated[Any, BeforeValidator(_generation_steps), WithJsonSchema(_GENERATION)] = None


class Feature(OwnModel):
    id: Annotated[int, Field(ge=0, lt=_INDEX)]
    op: Literal["raise", "lower", "set", "add", "scale", "ablate"]
    value: Annotated[Any, BeforeValidator(_latent_value), WithJsonSchema(_VALUE)] = None

    @model_validator(mode="after")
    def _value_fits_op(self) -> Self:
        if self.op == "ablate":
            if self.value is not None:
                raise wrong_field("value", "ablate takes no value")
        elif self.value is None:
            raise missing_field("value", f"{self.op} needs a value")
        elif isinstance(self.value, OfMax) and self.op == "scale":
            raise wrong_field("value", "scale takes a plain factor, of what the latent is at that moment")
        elif self.op != "add" and (self.value.factor if isinstance(self.value, OfMax) else self.value) < 0:
            raise wrong_field("value", f"{self.op} needs a value of at least 0: latents are never negative")
        return self


class EditBody(OwnModel):
    sae: Name
    features: Annotated[list[Feature], Field(max_length=MAX_FEATURES)]
    apply: Apply = Apply()

    def to_edit(self) -> SAEEdit:
        features = (FeatureEdit(found.id, found.op, found.value or 0.0) for found in self.features)
        return SAEEdit(self.sae, tuple(features))


class Return(OwnModel):
    report: bool = True


class SteeringBody(OwnModel):
    """A profile, or free edits; never both."""

    profile: Name | None = None
    direction: Name | None = None
    strength: Strength | None = None
    strength_mode: Literal["targets", "delta"] | None = None
    layers: Layers | None = None
    edits: Annotated[list[EditBody], Field(max_length=MAX_EDITS)] | None = None
    on_unavailable: Literal["error", "ignore"] | None = None
    compare: bool | None = None
    returned: Annotated[Return | None, Field(alias="return")] = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.edits is None:
            if self.profile is None:
                raise missing_field("profile", "give a profile, or edits")
            if self.direction is None:
                raise missing_field("direction", "a profile needs a direction")
            if self.layers is not None and len(set(self.layers)) != len(self.layers):
                raise wrong_field("layers", "a layer is named twice")
            return self
        for field in ("profile", "direction", "strength", "strength_mode", "layers"):
            if getattr(self, field) is not None:
                raise wrong_field(field, f"{field} cannot be combined with edits; give a profile or edits, not both")
        for index, edit in enumerate(self.edits):
            if edit.apply != self.edits[0].apply:
                raise wrong_field(f"edits.{index}.apply", "all edits of a request apply at the same positions")
        return self

    def to_steering(self) -> ProfileSteering | FeatureSteering:
        if self.profile is not None and self.direction is not None:
            layers = tuple(sorted(self.layers)) if self.layers else None
            return ProfileSteering(
                "steering", self.profile, self.direction, self.strength, self.strength_mode or "targets", layers
            )
        edits = self.edits or []
        apply = edits[0].apply if edits else Apply()
        return FeatureSteering(tuple(edit.to_edit() for edit in edits), apply.prompt, apply.generation)

    def to_options(self) -> SteeringOptions:
        return SteeringOptions(
            best_effort=self.on_unavailable == "ignore",
            compare=bool(self.compare),
            report=self.returned is None or self.returned.report,
        )


class Then(OwnModel):
    profile: Name
    direction: Name
    strength: Strength | None = None


class Policy(OwnModel):
    if_at_least: Annotated[float, Field(ge=0, le=1)]
    then: Then


class ConflictBody(OwnModel):
    score: bool = True
    profile: Name | None = None
    policy: Policy | None = None

    def to_check(self) -> ConflictCheck:
        if self.policy is None:
            return ConflictCheck(self.score, self.profile)
        then = self.policy.then
        chosen = ProfileSteering("conflict.policy.then", then.profile, then.direction, then.strength)
        return ConflictCheck(self.score, self.profile, self.policy.if_at_least, chosen)
