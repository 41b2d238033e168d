"""/metrics in Prometheus' text format, on a port of its own: operators' figures are not for those who may ask the API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from bmoe.protocol.figures import BOUNDS, Seconds
from coordinator.metrics import METRICS, Metric, Reading

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
EDGES = (*(f"{bound:g}" for bound in BOUNDS), "+Inf")


class _Collector(Collector):
    """Reads the whole table at each scrape."""

    def __init__(self, look: Callable[[], Reading]) -> None:
        self._look = look

    def describe(self) -> Iterable[Family]:
        """The families' names; given here so that none of them is read while the registry is made."""
        return [_family(metric, ()) for metric in METRICS]

    def collect(self) -> Iterator[Family]:
        """Every metric, read at the moment of asking."""
        reading = self._look()
        for metric in METRICS:
            yield _family(metric, metric.read(reading))


def registry_of(look: Callable[[], Reading]) -> CollectorRegistry:
    """A registry of our table and of what prometheus_client tells of this process."""
    registry = CollectorRegistry()
    registry.register(_Collector(look))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


def metrics_app(registry: CollectorRegistry) -> Callable[..., Awaitable[None]]:
    """An ASGI application that answers GET /metrics. One thread reads what the same thread counts: the event loop's."""

    async def app(scope: dict[str, Any], receive: Any, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        """GET /metrics, and nothing else."""
        found = scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/metrics"
        status, kind, body = 404, "text/plain", b"GET /metrics\n"
        if found:
            accept = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"accept"), "")
            encode, kind = choose_encoder(accept)
            status, body = 200, encode(registry)
        headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


def _family(metric: Metric, samples: Iterable[tuple[tuple[str, ...], float | Seconds]]) -> Family:
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(metric.name, metric.meaning, labels=metric.labels)
        for labels, value in samples:
            assert isinstance(value, Seconds)
            histogram.add_metric(labels, _buckets(value), value.total)
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family: CounterMetricFamily | GaugeMetricFamily = kind(metric.name, metric.meaning, labels=metric.labels)
    for labels, value in samples:
        assert not isinstance(value, Seconds)
        family.add_metric(labels, value)
    return family


def _buckets(seconds: Seconds) -> list[tuple[str, float]]:
    """Prometheus' buckets are cumulative."""
    found, sofar = [], 0
    for edge, count in zip(EDGES, seconds.counts, strict=True):
        sofar += count
        found.append((edge, float(sofar)))
    return found
