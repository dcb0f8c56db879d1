"""What the service counts and times, in Prometheus' format, and its access log.

The log has JSON lines in a file of its own, written by a thread, so that a slow or full disk stops no answer.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler, WatchedFileHandler
from pathlib import Path
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from nndefense.files import make_folder
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


FILE = "access.jsonl"
_WAITING = 10_000
_BYTES = 64 * 2**20
_KEPT = 4
_log = logging.getLogger(__name__)


class Journal:
    """A log that gives up lines rather than time.

    Before it grows beyond 64 MiB the file is renamed to ``access.jsonl.1`` and so on; four old ones are kept. What
    cannot be written, because the disk is full or too slow, is counted and dropped, and said once in the server's own
    log.

    Args:
        folder: where the file is; created where it is missing.
        lost: called with the number of lines that could not be written.

    Raises:
        InputError: the folder cannot be created or written.
    """

    def __init__(self, folder: Path, lost: Callable[[int], None], *, max_bytes: int = _BYTES) -> None:
        make_folder(folder)
        self.path = folder / FILE
        lines: queue.Queue[Any] = queue.Queue(_WAITING)
        self._entrance = _Entrance(lines, lost)
        self._listener = _Listener(lines, _File(self.path, max_bytes, lost))
        self._listener.start()

    def put(self, line: Mapping[str, Any]) -> None:
        """Write a line soon; never waits and never fails."""
        self._entrance.emit(logging.makeLogRecord({"msg": line}))

    def close(self) -> None:
        """Write what waits, for five seconds at most, and end the thread."""
        # The listener itself would wait for as long as the disk does.
        stopping = threading.Thread(target=self._listener.stop, daemon=True)
        stopping.start()
        stopping.join(5)


class _Entrance(QueueHandler):
    """Puts lines into the queue as they are, and counts those that find it full."""

    def __init__(self, lines: queue.Queue[Any], lost: Callable[[int], None]) -> None:
        super().__init__(lines)
        self._lost = lost

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

    def handleError(self, record: logging.LogRecord) -> None:
        self._lost(1)


class _Listener(QueueListener):
    """Makes text of the lines in its thread, and waits for room to end where the queue is full."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        record.msg = json.dumps(record.msg, ensure_ascii=True)
        return record

    def enqueue_sentinel(self) -> None:
        self.queue.put(None)  # type: ignore[attr-defined]


class _File(RotatingFileHandler, WatchedFileHandler):
    """The file: after it was renamed or deleted, lines go into one that can be found."""

    dev = ino = -1

    def __init__(self, path: Path, max_bytes: int, lost: Callable[[int], None]) -> None:
        super().__init__(path, maxBytes=max_bytes, backupCount=_KEPT, encoding="ascii", delay=True)
        self._lost, self._healthy, self._failed = lost, True, False

    def emit(self, record: logging.LogRecord) -> None:
        self._failed = False
        try:
            self.reopenIfNeeded()
        except OSError:
            self.handleError(record)
        else:
            super().emit(record)
        if not self._failed and not self._healthy:
            _log.warning("the access log can be written again")
        self._healthy = not self._failed

    def handleError(self, record: logging.LogRecord) -> None:
        self._lost(1)
        if self._healthy and not self._failed:
            _log.error("the access log cannot be written (%s); serving goes on without it", sys.exc_info()[1])
        self._failed = True
        # What could not be written must not be written later: it was counted as lost.
        stream, self.stream = self.stream, None
        if stream is not None:
            with suppress(OSError):
                stream.close()
