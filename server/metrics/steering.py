"""What steering did: requests by mode and outcome, sizes of edits, the conflict probe's scores."""

from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram

from server.decisions import Steered, SteeringMode, SteeringOutcome
from server.gate_report import SCORE_EDGES

OVERHEAD_EDGES = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
FEATURE_EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
REL_NORM_EDGES = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 4)


class SteeringMetrics:
    """Requests that asked for an edit or a conflict score. Profiles and features are never labels."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, edges: tuple[float, ...]) -> Histogram:
            return Histogram(f"deltaworks_{name}", text, buckets=edges, registry=registry)

        self.requests = Counter(
            "deltaworks_steering_requests",
            "Requests that asked to be steered or scored.",
            ["mode", "outcome"],
            registry=registry,
        )
        self.features = histogram("steering_feature_edits", "Latents that a request's edit works on.", FEATURE_EDGES)
        self.overhead = histogram(
            "steering_overhead_seconds", "Time that steering took of a request outside the engine.", OVERHEAD_EDGES
        )
        self.rows = Counter(
            "deltaworks_steering_edited_rows", "Rows of activations edited, over all layers.", registry=registry
        )
        self.rel_norm = histogram(
            "steering_rel_norm_ratio", "Norm of a layer's edit over the norm of what it edits.", REL_NORM_EDGES
        )
        self.score = histogram("conflict_score_ratio", "Scores of the conflict probe.", SCORE_EDGES)
        for mode in get_args(SteeringMode):
            for outcome in get_args(SteeringOutcome):
                self.requests.labels(mode, outcome)

    def record(self, steered: Steered) -> None:
        self.requests.labels(steered.mode, steered.outcome).inc()
        self.overhead.observe(steered.overhead_s)
        if steered.features:
            self.features.observe(steered.features)
        self.rows.inc(steered.edited_rows)
        for layer in steered.layers:
            self.rel_norm.observe(layer.rel_norm)
        if steered.score is not None:
            self.score.observe(steered.score)
