"""The steering part of `deltaworks demo`: one document that contradicts a fact, answered from either source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx

from server.demo_calls import expect, upload

_MAX_TOKENS = 12


def show_steering(client: httpx.Client, folder: Path, base: str, headers: dict[str, str]) -> None:
    """Upload the profile of `folder`, ask its question as it is and steered both ways, and print the answers.

    Raises DemoError, httpx.HTTPError, OSError.
    """
    folder = folder / "steering"
    description = json.loads((folder / "steering.json").read_text(encoding="utf-8"))
    nbytes = upload(client, "profiles", description["name"], folder / description["file"], headers)
    print(f"\nsteering, with the profile {description['name']} ({nbytes / 1e6:.1f} MB)")
    for prompt in description["prompts"]:
        print(f"\n{prompt.rsplit(chr(10) * 2, 1)[-1]}")
        for direction in (None, *description["directions"]):
            print(
                f"  {direction or 'not steered':14} ->{_answer(client, base, prompt, description['name'], direction)}"
            )


def _answer(client: httpx.Client, base: str, prompt: str, profile: str, direction: str | None) -> str:
    body: dict[str, Any] = {
        "model": base,
        "prompt": prompt,
        "max_tokens": _MAX_TOKENS,
        "temperature": 0,
        "stop": ["\n"],
        "conflict": {"score": True, "profile": profile},
    }
    if direction is not None:
        body["steering"] = {"profile": profile, "direction": direction}
    reply = client.post("/v1/completions", json=body)
    expect(reply, (200,))
    found = reply.json()
    report = found["gateway"]
    layers = report["steering"]["layers"] if direction is not None else []
    edit = f"   ({sum(layer['added'] + layer['removed'] for layer in layers)} latents moved)" if layers else ""
    return f"{found['choices'][0]['text']:16} conflict {report['conflict']['score']:.2f}{edit}"
