"""The reserve of added tokens, as the engine is told of it before it loads a model (worker/reserve.py does the rest)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def grown_vocabulary(base: Path, reserved_tokens: int) -> dict[str, Any]:
    """The argument that changes the base's configuration to a vocabulary with the reserve, if there is one."""
    if not reserved_tokens:
        return {}
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    if not isinstance(text.get("vocab_size"), int):
        raise ValueError("its configuration names no vocab_size; set engine.reserved_tokens to 0")
    larger = {"vocab_size": text["vocab_size"] + reserved_tokens}
    return {"hf_overrides": {"text_config": larger} if "text_config" in config else larger}
