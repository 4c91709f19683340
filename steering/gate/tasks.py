"""Tasks to label: a question, its tools, accepted answers, and what the tools return. One JSON object a line, no code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from steering.errors import LabelError
from steering.gate.dialogue import canonical, tool_name
from steering.gate.features import GATEABLE, Kind
from steering.gate.labels import read_lines
from steering.gate.schema import Strict, near

Executor = Literal["calculator", "lookup"]


class Task(Strict):
    """Either `question` or `messages`. `tools` are OpenAI's schemas, `tool_kinds` their kinds by name (else unknown).

    A call is answered by `tool_results` (tool -> arguments as JSON -> result), else by the tool's executor, else by the
    tool server.
    """

    id: Annotated[str, Field(min_length=1)]
    question: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = Field(min_length=1)
    tool_kinds: dict[str, Kind]
    gold: tuple[str, ...] = Field(min_length=1)
    tool_results: dict[str, dict[str, Any]] = Field(default_factory=dict)
    executors: dict[str, Executor] = Field(default_factory=dict)

    @property
    def dialogue(self) -> list[dict[str, Any]]:
        return list(self.messages) or [{"role": "user", "content": self.question}]

    @property
    def kinds(self) -> dict[str, Kind]:
        return {name: self.tool_kinds.get(name, "unknown") for name in map(tool_name, self.tools)}

    @property
    def gateable(self) -> frozenset[str]:
        return frozenset(name for name, kind in self.kinds.items() if kind in GATEABLE)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.question) == bool(self.messages):
            raise ValueError("either question or messages must be there")
        if self.messages and self.messages[-1].get("role") != "user":
            raise ValueError("messages: the last one must be the user's")
        names = [tool_name(tool) for tool in self.tools]
        if "" in names or len(set(names)) < len(names):
            raise ValueError("tools: every tool needs a name of its own")
        for field in ("tool_kinds", "tool_results", "executors"):
            for name in getattr(self, field):
                if name not in names:
                    raise ValueError(f"{field}: there is no tool {name!r}, {near(name, names)}")
        for name, results in self.tool_results.items():
            for arguments in results:
                try:
                    json.loads(arguments)
                except ValueError as error:
                    raise ValueError(f"tool_results.{name}: {arguments!r} is not JSON") from error
        return self

    def literal(self, name: str) -> dict[str, Any]:
        """Results of a tool by canonical arguments."""
        return {canonical(arguments): result for arguments, result in self.tool_results.get(name, {}).items()}


def read_tasks(path: Path) -> list[Task]:
    """Raises LabelError that names the line."""
    return read_lines(path, Task)


def read_facts(path: Path) -> dict[str, str]:
    """A JSON object of texts for the `lookup` executor. Raises LabelError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LabelError(f"cannot read the facts {path}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise LabelError(f"the facts {path} must be one JSON object of texts")
    return found


def need_facts(tasks: Sequence[Task]) -> bool:
    return any("lookup" in task.executors.values() for task in tasks)
