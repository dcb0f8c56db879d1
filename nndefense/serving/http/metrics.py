"""What the service counts and times, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from nndefense.guard.prediction import Defended

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
PARTS = ("body", "decode", "queue", "batch", "forward", "search", "explain", "encode")
"""The parts of a classification that are timed: receiving the body, decoding its images, waiting for a batch, the whole
batch, in it the forward pass, the search and the reading of the neighbours, and writing the answer."""


class Metrics:
    """The numbers of one server; each server has its own, so that two in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = counter("nndefense_requests", "Answers, by route and status.", ("route", "status"))
        self.request_seconds = histogram(
            "nndefense_request_seconds",
            "From the end of the headers to the end of the answer, by route.",
            ("route",),
            buckets=_SECONDS,
        )
        seconds = histogram(
            "nndefense_part_seconds",
            "Latency of the parts of a classification: " + ", ".join(PARTS) + ".",
            ("part",),
            buckets=_SECONDS,
        )
        self.part = {name: seconds.labels(name) for name in PARTS}
        self.batch_size = histogram("nndefense_batch_size", "Images per batch.", buckets=_SIZES)
        self.images = counter("nndefense_images", "Images classified.")
        self.abstained = counter("nndefense_abstentions", "Images abstained on.")
        self.disagreed = counter(
            "nndefense_disagreements", "Images on which the defence and the bare classifier disagree."
        )
        self.rejected = counter("nndefense_rejected_inputs", "Refused requests, by problem code.", ("code",))
        self.reloads = counter("nndefense_reloads", "Attempts to load a database, by outcome.", ("outcome",))
        self.in_flight = gauge("nndefense_requests_in_flight", "Requests being answered.")
        self.log_lost = counter("nndefense_log_lines_lost", "Lines of the access log that could not be written.")
        self.ready = gauge("nndefense_ready", "1 where the database is loaded and verified.")
        self.database = gauge("nndefense_database", "1 for the database that is being served.", ("database", "model"))
        self._database: tuple[str, str] | None = None
        for outcome in ("succeeded", "failed"):
            self.reloads.labels(outcome)

    def watch(self, waiting: Callable[[], int], buffered: Callable[[], int]) -> None:
        """Read the gauges of the queue and of the buffered bodies when somebody asks for them."""
        queue = Gauge("nndefense_queue_images", "Images waiting for a batch.", registry=self.registry)
        queue.set_function(waiting)
        bodies = Gauge("nndefense_buffered_bytes", "Bytes of bodies held in memory.", registry=self.registry)
        bodies.set_function(buffered)

    def batch(self, size: int, seconds: float, waits: Sequence[float]) -> None:
        """Count a batch; called from the worker."""
        self.batch_size.observe(size)
        self.part["batch"].observe(seconds)
        for wait in waits:
            self.part["queue"].observe(wait)

    def observe(self, part: str, seconds: float) -> None:
        """Time a part that the guard reports; one that is not in :data:`PARTS` is not kept."""
        if part in self.part:
            self.part[part].observe(seconds)

    def predicted(self, predictions: Sequence[Defended]) -> None:
        """Count what was answered."""
        self.images.inc(len(predictions))
        self.abstained.inc(sum(one.abstained for one in predictions))
        self.disagreed.inc(sum(not one.agree for one in predictions))

    def serving(self, database: str, model: str) -> None:
        """Say which database is served from now on."""
        if self._database is not None:
            self.database.remove(*self._database)
        self._database = (database, model)
        self.database.labels(database, model).set(1)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)
