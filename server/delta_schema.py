"""The wire form of `delta`: deltas that are served together, as their weighted sum."""

from typing import Annotated, Self

from pydantic import Field, RootModel, model_validator

from server.core import DeltaPart
from server.wire import OwnModel, wrong_field

MAX_PARTS = 4
MAX_WEIGHT = 8.0


class DeltaPartBody(OwnModel):
    name: Annotated[str, Field(min_length=1, max_length=128)]
    weight: Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)] = 1.0


class CombinationBody(RootModel[Annotated[list[DeltaPartBody], Field(min_length=1, max_length=MAX_PARTS)]]):
    """Every delta once."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [part.name for part in self.root]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise wrong_field(f"{i}.name", "the delta is named twice; add up its weights")
        return self

    def to_parts(self) -> tuple[DeltaPart, ...]:
        return tuple(DeltaPart(part.name, part.weight) for part in self.root)
