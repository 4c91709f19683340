"""What the gate tells: headers, the body's `tool_gate`, a record for the log, and the metrics."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram

from server.decisions import Gated

FAIL_OPEN = ("gate_error", "timeout", "policy_mismatch")
SCORE_EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
LATENCY_EDGES = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

Json = dict[str, Any]


def headers(gated: Gated | None) -> list[tuple[bytes, bytes]]:
    """Of every answer to a request with tools, once the gate has decided."""
    if gated is None or gated.decision is None:
        return []
    decision = gated.decision
    return [
        (b"x-tool-gate", decision.action.encode()),
        (b"x-tool-gate-reason", decision.reason.encode()),
        (b"x-tool-gate-policy", (decision.policy_id or "none").encode()),
    ]


def body(gated: Gated | None) -> Json | None:
    if gated is None or gated.decision is None:
        return None
    decision = gated.decision
    shown = {
        "mode": gated.mode,
        "decision": decision.action,
        "reason": decision.reason,
        "score": _rounded(decision.score),
        "threshold": decision.threshold,
        "policy": gated.policy,
        "policy_id": decision.policy_id,
        "placement": gated.placement,
        "tool_choice_in": gated.choice_in,
        "tool_choice_out": gated.choice_out,
        "tools_removed": list(decision.tools_removed),
        "budget": {"limit": decision.budget.limit, "used": decision.budget.used} if decision.budget else None,
        "probe_usage": {"prompt_tokens": gated.prompt_tokens, "completion_tokens": gated.completion_tokens},
        "leak": gated.leak,
        "explored": decision.explored,
        "propensity": decision.propensity,
        "latency_ms": round(1000 * gated.latency_s, 3),
    }
    if gated.explain:
        shown |= {
            "stage": decision.stage,
            "signals": _numbers(gated),
            "stopped": decision.stopped,
            "problem": decision.problem,
        }
    return shown


def record(gated: Gated) -> Json | None:
    """For the log: numbers and words of ours only, no text of the request and no names of its tools."""
    if gated.decision is None or not gated.logged:
        return None
    decision = gated.decision
    return {
        "mode": gated.mode,
        "decision": decision.action,
        "reason": decision.reason,
        "policy_id": decision.policy_id,
        "placement": gated.placement,
        "stage": decision.stage,
        "score": decision.score,
        "threshold": decision.threshold,
        "propensity": decision.propensity,
        "explored": decision.explored,
        "signals": _numbers(gated),
        "stopped": decision.stopped,
        "tools_removed": len(decision.tools_removed),
        "probe_prompt_tokens": gated.prompt_tokens,
        "probe_completion_tokens": gated.completion_tokens,
        "leak": gated.leak,
        "latency_s": round(gated.latency_s, 6),
        "problem": decision.problem,
    }


def _numbers(gated: Gated) -> Json:
    return {name: _rounded(value) for name, value in gated.decision.signals.items()} if gated.decision else {}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


class GateMetrics:
    """Labels are from closed sets: modes, actions and reasons; policies and tools are never labels."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.decisions = Counter(
            "deltaworks_tool_gate_decisions",
            "Requests with tools, by what the gate decided.",
            ["mode", "decision", "reason"],
            registry=registry,
        )
        self.score = Histogram(
            "deltaworks_tool_gate_score",
            "Calibrated P(right without tools) where a score was reached.",
            buckets=SCORE_EDGES,
            registry=registry,
        )
        self.tokens = Counter(
            "deltaworks_tool_gate_probe_tokens",
            "Tokens of probes, and of answers that the gate did not send.",
            ["kind"],
            registry=registry,
        )
        self.latency = Histogram(
            "deltaworks_tool_gate_latency_seconds",
            "Time that deciding took, probes included.",
            buckets=LATENCY_EDGES,
            registry=registry,
        )
        self.leaks = Counter("deltaworks_tool_gate_leaks", "Answers with calls that were not to be.", registry=registry)
        self.fail_open = Counter(
            "deltaworks_tool_gate_fail_open",
            "Requests that the gate left alone because something was wrong.",
            ["reason"],
            registry=registry,
        )
        for kind in ("prompt", "completion"):
            self.tokens.labels(kind)
        for reason in FAIL_OPEN:
            self.fail_open.labels(reason)

    def record(self, gated: Gated) -> None:
        decision = gated.decision
        if decision is None:
            return
        self.decisions.labels(gated.mode, decision.action, decision.reason).inc()
        if gated.mode == "off":
            return
        self.latency.observe(gated.latency_s)
        if decision.score is not None:
            self.score.observe(decision.score)
        self.tokens.labels("prompt").inc(gated.prompt_tokens)
        self.tokens.labels("completion").inc(gated.completion_tokens)
        self.leaks.inc(gated.leak)
        if decision.reason in FAIL_OPEN:
            self.fail_open.labels(decision.reason).inc()
