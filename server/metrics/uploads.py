"""Uploads of one kind of artifact: how they end and why, their bytes, their time."""

from prometheus_client import CollectorRegistry, Counter, Histogram

UPLOAD_EDGES = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# What a refused file fails on; the rest of the reasons are not the file's.
FAULTS = ("digest", "format", "base_mismatch", "shape", "nonfinite", "too_large", "path")
REASONS = (*FAULTS, "invalid_name", "generation", "storage", "other")
_BY_CODE = {
    "digest_mismatch": "digest",
    "body_too_large": "too_large",
    "invalid_value": "invalid_name",
    "missing_parameter": "other",
    "insufficient_storage": "storage",
    "sae_mismatch": "base_mismatch",
}


def reason_of(code: str, told: str | None) -> str:
    """Why an upload was refused, from the error's code and what the check itself `told`."""
    if told in FAULTS:
        return told
    for ending, reason in (
        ("_base_mismatch", "base_mismatch"),
        ("_invalid", "format"),
        ("_generation_mismatch", "generation"),
    ):
        if code.endswith(ending):
            return reason
    return _BY_CODE.get(code, "other")


class UploadMetrics:
    def __init__(self, kind: str, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"deltaworks_{kind}_{name}", text, labels, registry=registry)

        self._ended = counter("uploads", f"Uploads of a {kind}, by how they ended and why.", "outcome", "reason")
        self._nbytes = counter("upload_bytes", f"Bytes received of uploads of a {kind}.")
        self._seconds = Histogram(
            f"deltaworks_{kind}_upload_duration_seconds",
            f"Time from the first byte of a {kind} to the answer.",
            buckets=UPLOAD_EDGES,
            registry=registry,
        )
        self._faults = counter(
            "verify_failures", f"Files that are no {kind} for this server, by what is wrong.", "reason"
        )
        for outcome in ("created", "identical", "aborted"):
            self._ended.labels(outcome, "none")
        for reason in REASONS:
            self._ended.labels("rejected", reason)
        for reason in FAULTS:
            self._faults.labels(reason)

    def ended(self, outcome: str, reason: str = "none") -> None:
        self._ended.labels(outcome, reason).inc()
        if reason in FAULTS:
            self._faults.labels(reason).inc()

    def received(self, nbytes: int, seconds: float) -> None:
        self._nbytes.inc(nbytes)
        self._seconds.observe(seconds)
