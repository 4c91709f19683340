"""Policies whose scores are easy to follow (each the logistic of one feature), and label rows of a small world of sums."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from steering.gate.cli import add_parser
from steering.gate.features import static_features
from steering.gate.labels import LabelRow, Labels, read_labels
from steering.gate.policy import Policy, read_policy
from steering.gate.schema import parse
from steering.gate.signals import Draft, PTrue, Samples
from steering.toolgate import GateRequest, Served

SERVED = Served("sha256:base", None, "f" * 64)
FEATURE = {
    "static": "text.digits",
    "draft": "draft.mean_logprob",
    "samples": "samples.top_share",
    "ptrue": "ptrue.p_true",
}


def stage(name: str, weight: float = 1.0, bias: float = 0.0, lo: float = 0.0, hi: float = 1.0) -> dict[str, Any]:
    return {
        "name": name,
        "features": [{"name": FEATURE[name], "mean": 0, "std": 1}],
        "logistic": {"weights": [weight], "bias": bias},
        "isotonic": {"x": [0, 1], "y": [0, 1]},
        "lo": lo,
        "hi": hi,
    }


def document(**changes: Any) -> dict[str, Any]:
    """Digits in the question speak against a direct answer; the draft's mean log-probability for it."""
    return {
        "schema_version": 1,
        "model": {"base_fingerprint": "sha256:base", "delta_digest": None, "template_sha256": "f" * 64},
        "tool_kinds": [
            {"match": "calc*", "kind": "compute"},
            {"match": "search", "kind": "lookup"},
            {"match": "private_search", "kind": "lookup", "gateable": False},
            {"match": "ask_*", "kind": "clarify"},
            {"match": "send_mail", "kind": "action"},
        ],
        "stages": [stage("static", -1, 2, 0.1, 0.9), stage("draft", 10, 3, 0.1, 0.95)],
        "thresholds": {"suppress": 0.8},
        "probes": {"order": ["draft"], "k": 3, "max_tokens": 8, "max_probe_tokens": 40, "timeout_ms": 1000},
        **changes,
    }


def policy(**changes: Any) -> Policy:
    return read_policy(json.dumps(document(**changes)).encode())


def tool(name: str, description: str = "") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": {}}}


def asking(text: str = "What is 12345 + 67890?", *tools: str, **other: Any) -> GateRequest:
    """A request with one user message; tools default to a calculator."""
    fields = {"messages": [{"role": "user", "content": text}], "served": SERVED, "explore_u": 0.99, **other}
    return GateRequest(tools=[tool(name) for name in tools or ("calculator",)], **fields)


def called(*calls: tuple[str, str], answered: bool = True) -> list[dict[str, Any]]:
    """An assistant message per call (name, arguments), each with its result."""
    messages: list[dict[str, Any]] = []
    for index, (name, arguments) in enumerate(calls):
        call = {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        if answered:
            messages.append({"role": "tool", "tool_call_id": f"call_{index}", "content": "7"})
    return messages


def rows(count: int, seed: int = 0, stages: tuple[str, ...] = ("draft",), **changes: Any) -> list[dict[str, Any]]:
    """Sums of one to ten digits. Short ones are known; the draft's confidence tells the rest; tools are right but for a tenth.

    The static features say half of it, the draft nearly all, samples and ptrue a little more.
    """
    random = np.random.default_rng(seed)
    found = []
    for index in range(count):
        digits = int(random.integers(1, 11))
        skill = 5.5 - digits + random.normal(0, 2)
        p_known = float(np.clip(round(8 / (1 + np.exp(-2 * skill))), 0, 8)) / 8
        without, with_tools = bool(random.random() < p_known), bool(random.random() < 0.9)
        called = bool(random.random() < 0.7)
        question = f"What is {'7' * digits} + 1?"
        features = {"static": static_features([{"role": "user", "content": question}], [], {}, ())}
        signals = {
            "draft": Draft("8", (float(min(-0.01, (skill - 3) / 5 + random.normal(0, 0.35))),), ((-0.1,),), True),
            "samples": Samples(tuple(str(i if random.random() > p_known else 99) for i in range(5)), 0, 20),
            "ptrue": PTrue(p_known * 0.8 + 0.1, 0.5),
        }
        features |= {name: signals[name].features() for name in stages}
        found.append(
            {
                "id": f"q{index}",
                "question": question,
                "kinds": {"calculator": "compute"},
                "features": features,
                "tokens": {name: signals[name].completion_tokens for name in stages},
                "p_known": p_known,
                "correct_without": without,
                "correct_with": with_tools,
                "called": called,
                "m": [int(called)],
                "n": 0 if without else 1,
                "probes": {"k": 5, "max_tokens": 8},
                "model": {"name": "tiny", "base_fingerprint": "sha256:base", "template_sha256": "f" * 64},
                **changes,
            }
        )
    return found


def write_rows(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def labels(path: Path, found: list[dict[str, Any]]) -> Labels:
    return read_labels(write_rows(path / "labels.jsonl", found))


def read_row(given_row: dict[str, Any]) -> LabelRow:
    return parse(LabelRow, json.dumps(given_row))


def gate(*arguments: object) -> int:
    """Run `deltaworks gate ...`."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["gate", *map(str, arguments)])
    status: int = args.run(args)
    return status
