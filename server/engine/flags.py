"""vLLM's own engine arguments, given under `[engine.vllm]`: named by its fields, read by its command-line parser, handed on."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from server.config import EngineSettings
from server.engine.base import EngineError

_WORDS = {"true": True, "false": False}  # the environment has no other way to say them


def passed_on(given: Mapping[str, Any], ours: Collection[str]) -> dict[str, Any]:
    """Values of `given` as vLLM's `EngineArgs` takes them; `ours` are the arguments that the gateway sets itself.

    Raises EngineError for a name that vLLM does not have, one that is ours to set, and a value that its parser refuses.
    """
    if not given:
        return {}
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc, unused-ignore]  # vLLM is not always installed
        def error(self, message: str) -> NoReturn:
            raise EngineError(f"engine.vllm: {message}")

    known = [field.name for field in dataclasses.fields(AsyncEngineArgs) if not field.name.startswith("_")]
    for name in given:
        _check(name, known, ours)
    parser = AsyncEngineArgs.add_cli_args(Parser(add_help=False, allow_abbrev=False))
    words = [word for name, value in given.items() for word in _words(name, value)]
    read = vars(parser.parse_args(words))
    return {name: read[name] for name in given}


def _check(name: str, known: list[str], ours: Collection[str]) -> None:
    """Raises EngineError."""
    where = f"engine.vllm.{name}"
    if name in ours:
        own = f"set engine.{name} instead" if name in EngineSettings.model_fields else "it cannot be changed"
        raise EngineError(f"{where} is set by the gateway; {own}")
    if name.startswith("data_parallel"):
        raise EngineError(f"{where}: deltas are loaded into one engine; run more servers instead of parallel engines")
    if name not in known:
        match = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {match[0]!r}?)" if match else ""
        raise EngineError(f"{where}: vLLM has no such engine argument{hint}")


def _words(name: str, value: Any) -> list[str]:
    """As one would type it behind `vllm serve`."""
    flag = name.replace("_", "-")
    value = _WORDS.get(value, value) if isinstance(value, str) else value
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, list):
        return [f"--{flag}", *map(str, value)]
    return [f"--{flag}={json.dumps(value) if isinstance(value, Mapping) else value}"]
