"""Many requests, one forward pass: what waits is gathered into batches that one thread works on.

The event loop puts work in, a thread of its own takes it out: so the next batch begins the moment the last one ends,
whatever the event loop is busy with.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

from nndefense.serving.http.problem import busy

K = TypeVar("K")
P = TypeVar("P")
R = TypeVar("R")

# How quickly the estimate of the seconds per item follows the last batches.
_MEMORY = 0.2


class _Job(Generic[K, P, R]):
    """The items of one call of ``submit``, which are answered together."""

    __slots__ = ("arrived", "future", "key", "left", "loop", "payloads", "results")

    def __init__(self, key: K, payloads: Sequence[P], loop: asyncio.AbstractEventLoop) -> None:
        self.key, self.payloads, self.loop = key, payloads, loop
        self.future: asyncio.Future[list[R]] = loop.create_future()
        self.results: list[Any] = [None] * len(payloads)
        self.left = len(payloads)
        self.arrived = time.monotonic()


class Batcher(Generic[K, P, R]):
    """A bounded queue before one worker thread.

    Items of different keys (the guards of before and after a change of database) never share a batch. Batches are
    taken in the order of arrival: as soon as there are enough items for a full one, or when the first has waited
    for ``wait`` seconds.

    Args:
        run: gets a key and 1 to ``size(key)`` payloads, and returns as many results; it runs in the worker thread.
            Where it fails for a batch of several jobs, each job is tried alone, so that none fails for another's fault.
        size: the largest batch of a key.
        wait: seconds.
        capacity: items that may wait.
        observer: is called with every batch's size, its seconds, and how long each item had waited; in the worker's
            thread.
        on_start: runs first in the worker thread.
    """

    def __init__(
        self,
        run: Callable[[K, list[P]], Sequence[R]],
        *,
        size: Callable[[K], int],
        wait: float,
        capacity: int,
        observer: Callable[[int, float, Sequence[float]], None] | None = None,
        on_start: Callable[[], None] | None = None,
    ) -> None:
        self._run, self._size, self._wait, self._capacity = run, size, wait, capacity
        self._observer, self._on_start = observer, on_start
        self._items: deque[tuple[_Job[K, P, R], int]] = deque()
        self._changed = threading.Condition()
        # How many items the worker sleeps for; 0 while it works.
        self._wanted = 0
        self._closing = False
        self._seconds_each = 0.0
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Items in the queue, without those being worked on."""
        return len(self._items)

    @property
    def backlog_seconds(self) -> float:
        """How long the queue will last, by the speed of the last batches."""
        return len(self._items) * self._seconds_each

    def check_room(self, items: int, timeout: float) -> None:
        """Raise ``queue_full`` unless so many items more fit in the queue and it lasts ``timeout`` seconds at most."""
        backlog = self.backlog_seconds
        if len(self._items) + items > self._capacity or backlog > timeout:
            raise busy("queue_full", "more requests are waiting than can be answered in time: try later", backlog)

    @property
    def alive(self) -> bool:
        """Whether the worker runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the worker; once."""
        self._thread = threading.Thread(target=self._work, name="nndefense-batches", daemon=True)
        self._thread.start()

    async def submit(self, key: K, payloads: Sequence[P], timeout: float) -> list[R]:
        """Have items worked on.

        Args:
            key: what they are worked on with.
            payloads: at least one item.
            timeout: seconds until the answer must be there.

        Returns:
            A result for each payload, in their order.

        Raises:
            ServiceProblem: ``queue_full`` where the items do not fit in the queue or the queue is too long for the time
                that they have, ``timed_out``, or ``stopping``. Errors of ``run`` are passed on.
        """
        loop = asyncio.get_running_loop()
        job: _Job[K, P, R] = _Job(key, payloads, loop)
        with self._changed:
            if self._closing:
                raise busy("stopping", "the server is being stopped: try again in a moment", 1)
            self.check_room(len(payloads), timeout)
            self._items.extend((job, number) for number in range(len(payloads)))
            if self._wanted and len(self._items) >= self._wanted:
                self._changed.notify()
        timer = loop.call_later(timeout, self._expire, job)
        try:
            return await job.future
        finally:
            timer.cancel()

    def close(self) -> None:
        """Take nothing more, finish what waits, and end the worker; returns at once."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def join(self, timeout: float) -> bool:
        """Wait for the worker to end; whether it did."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is None or not self._thread.is_alive()

    # -- in the worker thread -----------------------------------------------------------------------------------

    def _work(self) -> None:
        if self._on_start is not None:
            self._on_start()
        while batch := self._take():
            self._do(batch)
            # Nothing of the last batch is kept alive while waiting for the next.
            del batch

    def _take(self) -> list[tuple[_Job[K, P, R], int]]:
        """The next batch; empty when the batcher is closed and all is done."""
        with self._changed:
            while True:
                while self._items and self._items[0][0].future.done():
                    self._items.popleft()
                if not self._items:
                    if self._closing:
                        return []
                    self._sleep(1, None)
                    continue
                head = self._items[0][0]
                size = self._size(head.key)
                left = head.arrived + self._wait - time.monotonic()
                if len(self._items) < size and left > 0 and not self._closing:
                    self._sleep(size, left)
                # Empty where all of them gave up in this very moment, which is no reason to end.
                elif batch := self._gather(head.key, size):
                    return batch

    def _sleep(self, wanted: int, seconds: float | None) -> None:
        self._wanted = wanted
        self._changed.wait(seconds)
        self._wanted = 0

    def _gather(self, key: K, size: int) -> list[tuple[_Job[K, P, R], int]]:
        batch: list[tuple[_Job[K, P, R], int]] = []
        while self._items and len(batch) < size and self._items[0][0].key is key:
            item = self._items.popleft()
            # Whoever gave up waiting is not worked for.
            if not item[0].future.done():
                batch.append(item)
        return batch

    def _do(self, batch: list[tuple[_Job[K, P, R], int]]) -> None:
        begun = time.monotonic()
        key = batch[0][0].key
        failed: dict[int, tuple[_Job[K, P, R], BaseException]] = {}
        try:
            results: list[R | None] = list(self._run(key, [job.payloads[number] for job, number in batch]))
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for {len(batch)} items")
        except Exception as error:
            results = [None] * len(batch)
            jobs = {id(job): job for job, _ in batch}
            for one in jobs.values():
                places = [place for place, (job, _) in enumerate(batch) if job is one]
                try:
                    if len(jobs) == 1:
                        raise error
                    again = self._run(key, [one.payloads[batch[place][1]] for place in places])
                    for place, own in zip(places, again, strict=True):
                        results[place] = own
                except Exception as fault:
                    failed[id(one)] = (one, fault)
        seconds = time.monotonic() - begun
        self._seconds_each += (_MEMORY if self._seconds_each else 1) * (seconds / len(batch) - self._seconds_each)
        done: list[_Job[K, P, R]] = []
        for (job, number), result in zip(batch, results, strict=True):
            if id(job) in failed:
                continue
            job.results[number] = result
            job.left -= 1
            if not job.left:
                done.append(job)
        # The answers are on their way before anything is counted.
        for loop in {job.loop for job, _ in batch}:
            # A loop that has ended meanwhile has nobody left who waits.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._deliver, loop, done, list(failed.values()))
        if self._observer is not None:
            self._observer(len(batch), seconds, [begun - job.arrived for job, _ in batch])

    # -- in the event loop --------------------------------------------------------------------------------------

    @staticmethod
    def _deliver(
        loop: asyncio.AbstractEventLoop,
        done: list[_Job[K, P, R]],
        failed: list[tuple[_Job[K, P, R], BaseException]],
    ) -> None:
        for job in done:
            if job.loop is loop and not job.future.done():
                job.future.set_result(job.results)
        for job, error in failed:
            if job.loop is loop and not job.future.done():
                job.future.set_exception(error)

    def _expire(self, job: _Job[K, P, R]) -> None:
        if not job.future.done():
            late = "the prediction was not ready in time: try later"
            job.future.set_exception(busy("timed_out", late, self.backlog_seconds))
