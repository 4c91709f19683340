"""The wire form of `tool_gate`: checked for shape and range; what this server allows is decided by gate.py."""

from typing import Annotated, Literal

from pydantic import Field

from server.core import ToolGateAsk
from server.wire import OwnModel


class ToolGateBody(OwnModel):
    mode: Literal["off", "observe", "enforce"] | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    budget: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    explain: bool | None = None
    policy: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    allow_require: bool | None = None

    def to_ask(self) -> ToolGateAsk:
        return ToolGateAsk(
            self.mode, self.threshold, self.budget, bool(self.explain), self.policy, bool(self.allow_require)
        )
