"""A policy whose scores are easy to follow: the score of each stage is the logistic of its one feature, uncalibrated."""

import json
from typing import Any

from steering.gate_policy import Policy, read_policy
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
