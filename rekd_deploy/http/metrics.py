"""What the server counts of its own, for Prometheus; Triton has its own metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


class Metrics:
    """Counters of one application. Labels are of a few values: nothing that a client writes becomes one."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        labels = ("route", "method", "status")
        self._requests = Counter("rekd_http_requests", "Requests answered.", labels, registry=self._registry)
        self._failures = Counter(
            "rekd_http_failures", "Requests refused or failed, by the problem.", ("route", "problem"),
            registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "rekd_http_request_seconds", "From a request's head to the end of its answer.", ("route",),
            buckets=_BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._items = Counter("rekd_http_items", "Texts and images answered.", ("kind",), registry=self._registry)
        self.in_flight = Gauge("rekd_http_requests_in_flight", "Requests on their way.", registry=self._registry)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, method if method in _METHODS else "other", str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def failed(self, route: str, problem: str) -> None:
        """Count a problem, by a key of ``KINDS``."""
        self._failures.labels(route, problem).inc()

    def items(self, kind: str, count: int) -> None:
        """Count answered texts or images."""
        self._items.labels(kind).inc(count)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)
