"""What Prometheus reads: the engine's numbers at the moment of asking, and counts of requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from alitok_fast.serving.stats import BUCKETS, EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "alitok_"
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


class Metrics:
    """The metrics of a service; `stats` gives the engine's, or None while there is no engine.

    Every sample has `labels` too, which tell one service from others like it.
    """

    def __init__(self, stats: Callable[[], EngineStats | None], labels: Mapping[str, str] | None = None) -> None:
        self._stats, self._labels = stats, dict(labels or {})
        self._registry = CollectorRegistry()
        self._requests = Counter(
            f"{PREFIX}http_requests", "HTTP requests by route, method and status.", ("route", "method", "status"),
            registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            f"{PREFIX}http_request_seconds", "Seconds of an HTTP request, by route.", ("route",), buckets=BUCKETS,
            registry=self._registry,
        )  # fmt: skip
        self._registry.register(self)

    def observe(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request."""
        method = method if method in METHODS else "other"  # the client's own text would be a series each
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(_Labelled(self._registry, self._labels))

    def describe(self) -> list[Any]:
        """Nothing before the engine is there."""
        return []

    def collect(self) -> Iterator[Any]:
        stats = self._stats()
        if stats is None:
            return
        for name, help, value in (
            ("queue_length", "Requests that wait.", stats.queue_length),
            ("queue_limit", "Requests that may wait.", stats.queue_limit),
            ("sequences_in_use", "Sequences of the cache that are in use; a guided image takes two.",
             stats.sequences_in_use),
            ("sequences", "Sequences of the cache.", stats.sequences),
            ("images_running", "Images that are being sampled.", stats.running),
        ):  # fmt: skip
            yield GaugeMetricFamily(PREFIX + name, help, value)
        for name, help, count in (
            ("passes", "Passes of the generator.", stats.passes),
            ("image_passes", "Passes, counted once for each image in them.", stats.image_passes),
            ("tokens", "Tokens that were settled.", stats.tokens),
            ("busy_seconds", "Seconds in passes.", stats.busy_seconds),
        ):  # fmt: skip
            yield CounterMetricFamily(PREFIX + name, help, count)
        ends = CounterMetricFamily(f"{PREFIX}images", "Requests for an image, by their end.", labels=["end"])
        for end, count in stats.requests.items():
            ends.add_metric([end], count)
        yield ends
        per_token = stats.image_passes / stats.tokens if stats.tokens else 0.0
        yield GaugeMetricFamily(f"{PREFIX}passes_per_token", "Passes that an image takes for a token.", per_token)
        for kind, latency in stats.latency.items():
            name, help = f"{PREFIX}{kind}_seconds", f"Seconds from submission: {kind.replace('_', ' ')}."
            buckets = [
                (f"{bound:g}", count) for bound, count in zip((*BUCKETS, float("inf")), latency.counts, strict=True)
            ]
            buckets[-1] = ("+Inf", latency.counts[-1])
            yield HistogramMetricFamily(name, help, buckets=buckets, sum_value=latency.total)
            quantiles = GaugeMetricFamily(f"{name}_quantile", f"{help} Of the last requests.", labels=["quantile"])
            for quantile, seconds in latency.quantiles.items():
                quantiles.add_metric([f"{quantile:g}"], seconds)
            yield quantiles


class _Labelled(CollectorRegistry):
    """A registry whose samples have these labels too."""

    def __init__(self, registry: CollectorRegistry, labels: dict[str, str]) -> None:
        super().__init__()
        self._inner, self._more = registry, labels

    def collect(self) -> Iterator[Any]:
        for family in self._inner.collect():
            family.samples = [sample._replace(labels={**sample.labels, **self._more}) for sample in family.samples]
            yield family
