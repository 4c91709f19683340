"""What the pools count: loads, evictions, and for deltas the tiers that they are in."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from server.decisions import Swap
from server.metrics.labels import DeltaLabels

LOAD_EDGES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

# lru: one too many; budget: too many bytes; unload, delete: the admin's wish.
Reason = Literal["lru", "budget", "unload", "delete"]
LEVELS = ("engine", "ram")


class ResidencyMetrics:
    """What a pool counts; `kind` is what it holds. `sources`: where loads of the kind may read from, where that is told."""

    def __init__(self, kind: str, registry: CollectorRegistry, sources: tuple[str, ...] = ()) -> None:
        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(f"deltaworks_{kind}_{name}", text, labels, registry=registry)

        self._told = bool(sources)
        source, level = (["source"], ["level"]) if sources else ([], [])
        self._resident = Gauge(f"deltaworks_{kind}_slots_used", f"{kind}s in memory.", level, registry=registry)
        self._loads = counter("loads", f"{kind}s made resident.", [*source, "outcome"])
        self._load_seconds = Histogram(
            f"deltaworks_{kind}_load_duration_seconds",
            f"Time to make a {kind} resident, without the wait for room.",
            source,
            buckets=LOAD_EDGES,
            registry=registry,
        )
        self._evictions = counter("evictions", f"{kind}s dropped from memory.", [*level, "reason"])
        self.coalesced = counter("load_coalesced", f"Requests that joined the load of a {kind} under way.", [])
        self.thrash = counter("thrash", f"Loads of a {kind} that was dropped to make room a moment ago.", [])
        for told in sources or ("",):
            for outcome in ("ok", "error", "cancelled"):
                self._of(self._loads, told, outcome)
            self._of(self._load_seconds, told)
        for told in LEVELS if sources else ("",):
            for reason in get_args(Reason):
                self._of(self._evictions, told, reason)

    def count_load(self, source: str, outcome: str) -> None:
        self._of(self._loads, source, outcome).inc()

    def time_load(self, source: str, seconds: float) -> None:
        self._of(self._load_seconds, source).observe(seconds)

    def count_eviction(self, reason: Reason, level: str = "engine") -> None:
        self._of(self._evictions, level, reason).inc()

    def show_resident(self, count: int, nbytes: int) -> None:
        self._of(self._resident, "engine").set(count)

    def _of(self, metric: Any, told: str, *labels: str) -> Any:
        """The series of a metric; `told` is its first label where sources are told."""
        labels = (told, *labels) if self._told else labels
        return metric.labels(*labels) if labels else metric


class DeltaMetrics(ResidencyMetrics):
    """Deltas on two levels above the disk: in execution form ("engine"), and packed in RAM ("ram")."""

    def __init__(self, registry: CollectorRegistry, labels: DeltaLabels) -> None:
        super().__init__("delta", registry, sources=("disk", "ram"))

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"deltaworks_delta_{name}", text, labels, registry=registry)

        self._registry, self._labels = registry, labels
        self._bytes = gauge("resident_bytes", "Memory that deltas take.", "level")
        self._budget = gauge("budget_bytes", "The most memory that deltas may take; +Inf without a limit.", "level")
        self._slots = gauge("slots", "The most deltas that may be resident at once.", "level")
        self.pinned = gauge("pinned", "Deltas that stay resident also without requests.")
        self.read_seconds = Histogram(
            "deltaworks_delta_read_duration_seconds",
            "Time to read a delta's file into RAM.",
            buckets=LOAD_EDGES,
            registry=registry,
        )
        self.swap_seconds = Histogram(
            "deltaworks_delta_swap_duration_seconds",
            "Time that a request waited until its delta was resident, by where the delta was.",
            ["kind"],
            buckets=LOAD_EDGES,
            registry=registry,
        )
        self.lookups = Counter(
            "deltaworks_delta_lookups",
            "Requests by what they found: their delta resident, not resident, or just failed to load.",
            ["result"],
            registry=registry,
        )
        for kind in get_args(Swap):
            self.swap_seconds.labels(kind)
        for result in ("hit", "miss", "negative"):
            self.lookups.labels(result)
        for level in LEVELS:
            self._bytes.labels(level), self._of(self._resident, level)

    def show_limits(self, slots: int, nbytes: int | None, packed_nbytes: int) -> None:
        """`nbytes` None: no limit."""
        self._slots.labels("engine").set(slots)
        self._budget.labels("engine").set(float("inf") if nbytes is None else nbytes)
        self._budget.labels("ram").set(packed_nbytes)

    def show_resident(self, count: int, nbytes: int) -> None:
        super().show_resident(count, nbytes)
        self._bytes.labels("engine").set(nbytes)

    def show_packed(self, count: int, nbytes: int) -> None:
        self._of(self._resident, "ram").set(count)
        self._bytes.labels("ram").set(nbytes)

    def watch(self, census: Callable[[], "Census"]) -> None:
        """Ask `census` at every scrape what is true of each name."""
        self._registry.register(_CensusCollector(census, self._labels))


@dataclass(frozen=True)
class Census:
    """Registered deltas: by state, those of old versions that requests still use, and where each name's active version is."""

    states: Mapping[str, int]
    retired: int
    resident: Mapping[str, tuple[str, ...]]


class _CensusCollector(Collector):
    """Of the names that have labels, and of all others together."""

    def __init__(self, census: Callable[[], Census], labels: DeltaLabels) -> None:
        self._census, self._labels = census, labels

    def collect(self) -> Iterator[GaugeMetricFamily]:
        census = self._census()
        states = GaugeMetricFamily("deltaworks_delta_registered", "Names of deltas by state.", labels=["state"])
        for state, count in census.states.items():
            states.add_metric([state], count)
        yield states
        yield GaugeMetricFamily(
            "deltaworks_delta_retired_generations",
            "Versions that no name points to any more and that requests still use.",
            value=census.retired,
        )
        resident = GaugeMetricFamily(
            "deltaworks_delta_resident",
            "Whether a delta is on a level of memory; how many of those that share the label other.",
            labels=["level", "delta"],
        )
        others = dict.fromkeys(LEVELS, 0)
        for name, levels in census.resident.items():
            for level in LEVELS:
                if self._labels.known(name):
                    resident.add_metric([level, name], level in levels)
                else:
                    others[level] += level in levels
        for level, count in others.items():
            resident.add_metric([level, "other"], count)
        yield resident
