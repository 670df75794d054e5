"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine import Engine, Result
from ..engine.records import TIMES

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)

Engines = Callable[[], Iterable[tuple[str, Engine]]]
"""Returns name and engine of all models that are loaded."""


class Metrics:
    """The counts of one server.

    Attributes:
        answers: answers by path and status.
        seconds: how long answers took, by path.
        waited, first_step, total: of images and clips, by model: seconds in the queue, until the first step, and until
            the end.
        steps: steps by model and decision: full, accepted (forecast), or rejected (recomputed).
        refused: requests that were refused, by cause.
        cancelled: images and clips that were given up, by cause.
    """

    def __init__(self, engines: Engines) -> None:
        self.registry = registry = CollectorRegistry()
        self.answers = Counter("speca_http_answers", "Answers.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "speca_http_seconds", "Seconds until an answer ended.", ["path"], buckets=SECONDS, registry=registry
        )
        about = {
            "waited": "Seconds in the queue.", "first_step": "Seconds until the first step.",
            "total": "Seconds from arrival to end.",
        }  # fmt: skip
        self.waited, self.first_step, self.total = (
            Histogram(f"speca_{name}_seconds", text, ["model"], buckets=SECONDS, registry=registry)
            for name, text in about.items()
        )
        self.steps = Counter("speca_steps", "Steps by decision.", ["model", "decision"], registry=registry)
        self.refused = Counter("speca_refused", "Requests refused, by cause.", ["cause"], registry=registry)
        self.cancelled = Counter("speca_cancelled", "Images given up, by cause.", ["cause"], registry=registry)
        registry.register(_OfEngines(engines))

    def ended(self, model: str, result: Result) -> None:
        """Count an image or a clip that has ended well."""
        self.waited.labels(model).observe(result.waited)
        self.total.labels(model).observe(result.waited + result.seconds)
        for sample in result.report.samples if result.report is not None else ():
            for decision in ("full", "accepted", "rejected"):
                self.steps.labels(model, decision).inc(getattr(sample, decision))

    def text(self) -> bytes:
        """Return all counts in Prometheus' text format."""
        return generate_latest(self.registry)


class _OfEngines(Collector):
    """Figures of the engines, read when they are asked for."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        gauges = {
            "live": "Requests under way.", "queued": "Requests that wait to start.",
            "bytes": "Bytes that requests under way hold, where memory is limited.",
            "alive": "1 if the engine's thread runs.",
        }  # fmt: skip
        own = {n: GaugeMetricFamily(f"speca_engine_{n}", text, labels=["model"]) for n, text in gauges.items()}
        counts = {
            "done": "Requests that ended well.", "failed": "Requests that failed or were cancelled.",
            "ticks": "Rounds of the engine's loop.", "reads": "Reads from the device.",
        }  # fmt: skip
        sums = {n: CounterMetricFamily(f"speca_engine_{n}", t, labels=["model"]) for n, t in counts.items()}
        lanes = {
            n: CounterMetricFamily(f"speca_lane_{n}", text, labels=["model", "lane"])
            for n, text in {"rows": "Rows of batches.", "waited": "Rounds that requests waited for batches."}.items()
        }
        times = HistogramMetricFamily("speca_lane_seconds", "Seconds of batches.", labels=["model", "lane"])
        for model, engine in self._engines():
            found: dict[str, Any] = {**engine.statistics, "alive": float(engine.alive)}
            for name, family in own.items():
                family.add_metric([model], found[name])
            for name, total in sums.items():
                total.add_metric([model], found[name])
            for lane, counted in found["lanes"].items():
                for name, total in lanes.items():
                    total.add_metric([model, lane], counted[name])
                bounds = [*map(str, TIMES), "+Inf"]
                buckets = list(zip(bounds, accumulate(counted["times"]), strict=True))
                times.add_metric([model, lane], buckets, sum_value=counted["seconds"])
        return [*own.values(), *sums.values(), *lanes.values(), times]
