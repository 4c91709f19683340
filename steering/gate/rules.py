"""The gate's rules that need no score: budgets of calls per question, and calls that were made before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from steering.gate.dialogue import Call
from steering.gate.features import GateableKind


@dataclass(frozen=True)
class Budget:
    """Gateable calls since the last user message, of the tools that a limit holds for."""

    limit: int
    used: int

    @property
    def left(self) -> int:
        return self.limit - self.used


def spent_tools(
    calls: Sequence[Call], kinds: Mapping[str, str], limits: Mapping[GateableKind, int], over_all: int | None
) -> tuple[set[str], Budget | None]:
    """Tools that may not be called again, and the tightest budget of all.

    `kinds` is of the gateable tools in play, `calls` are those to them since the last user message; `limits` are per kind,
    `over_all` is for all of them together.
    """
    held = [([name for name in kinds if kinds[name] == kind], limit) for kind, limit in limits.items()]
    if over_all is not None:
        held.append((list(kinds), over_all))
    budgets = [(names, Budget(limit, sum(call.name in names for call in calls))) for names, limit in held if names]
    spent = {name for names, budget in budgets if budget.left <= 0 for name in names}
    return spent, min((budget for _, budget in budgets), key=lambda budget: budget.left, default=None)


def repeated_tools(calls: Sequence[Call], asked: Collection[Call] | None) -> set[str]:
    """Tools of a call whose result is there already: made again in the answer to be checked, or twice so far."""
    answered = Counter((call.name, call.arguments) for call in calls if call.answered)
    if asked is not None:
        return {call.name for call in asked if (call.name, call.arguments) in answered}
    return {name for (name, _), times in answered.items() if times > 1}
