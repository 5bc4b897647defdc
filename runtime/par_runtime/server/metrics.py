"""What a server counts, in the form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from par_runtime import __version__
from par_runtime.batcher import Batcher

SECONDS = (
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)  #: upper ends of the parts of a histogram
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The counters of one server: requests by path and code, how long those of images took, and the Batcher's own."""

    def __init__(self, batcher: Batcher) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(_Made(batcher))
        bundle, info = batcher.pipeline.bundle, batcher.pipeline.backend.info
        about = {"version": __version__, "bundle": bundle.name, "hash": bundle.hash[:12], "backend": info.name}
        Info("parvis", "What is served, and what computes it", registry=self.registry).info(about)
        waiting = Gauge("parvis_waiting", "Images that wait for their turn", registry=self.registry)
        waiting.set_function(lambda: batcher.waiting)
        self._requests = Counter(
            "parvis_requests", "Answers, by path and HTTP status", ["path", "code"], registry=self.registry
        )
        self._seconds = Histogram(
            "parvis_request_seconds",
            "From a request for images to its answer, waiting and encoding included",
            buckets=SECONDS,
            registry=self.registry,
        )

    def count(self, path: str, code: int) -> None:
        """An answer was given. ``path``: of a route, not as it was asked for: there are few of them."""
        self._requests.labels(path, str(code)).inc()

    def took(self, seconds: float) -> None:
        """Images were made and sent."""
        self._seconds.observe(seconds)

    def text(self) -> bytes:
        """All of it."""
        return bytes(generate_latest(self.registry))


class _Made(Collector):
    """Images and calls, which the Batcher counts itself."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Their numbers now."""
        yield CounterMetricFamily("parvis_images", "Images that were made", self._batcher.images)
        yield CounterMetricFamily(
            "parvis_calls",
            "Calls of the pipeline; each makes the images of up to max_batch requests",
            self._batcher.calls,
        )
