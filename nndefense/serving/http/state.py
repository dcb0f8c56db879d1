"""What a running service holds: the guard that serves, the queue before it, and how one guard replaces another."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from nndefense.errors import NNDefenseError
from nndefense.guard import Defended, Guard
from nndefense.serving.http.batcher import Batcher
from nndefense.serving.http.metrics import Journal, Metrics
from nndefense.serving.http.problem import ServiceProblem, busy
from nndefense.serving.http.security import Gate, Keys
from nndefense.serving.http.settings import ServingSettings

T = TypeVar("T")
MAX_BATCH = 32
_SLOW_WAITING = 4
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Question:
    image: Tensor
    top: int
    neighbors: int


class Pool:
    """Threads, made later, with a bound on the calls that may wait for them or run in them: beyond ``most``, a 503 says
    ``refusal`` and to try again in ``seconds``.
    """

    def __init__(self, most: int, refusal: str, seconds: float) -> None:
        self._most, self._refusal, self._seconds, self._calls = most, refusal, seconds, 0
        self.threads: ThreadPoolExecutor | None = None

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in one of the threads.

        Raises:
            ServiceProblem: ``queue_full``.
        """
        assert self.threads is not None, "the state is not started"
        if self._calls >= self._most:
            raise busy("queue_full", self._refusal, self._seconds)
        self._calls += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)
        finally:
            self._calls -= 1


class ServingState:
    """The state of one service; made by :func:`~nndefense.serving.app.create_app`, which starts and stops it.

    Args:
        guard: the guard, or what opens one; where it is opened by a call, that runs in a thread after the start, and
            again at every reload.
        settings: the settings.

    Attributes:
        settings, metrics, batcher, gate, journal: what their names say; ``journal`` is None without a log folder.
        small: few threads for short work, such as decoding or reading a file.
        slow: one thread for long work, such as an attack, beside the predictions.
        error: why the first guard could not be opened, or None.
        last_reload: what the last attempt to load a database came to, or None.
    """

    def __init__(self, guard: Guard | Callable[[], Guard], settings: ServingSettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.gate = Gate(settings, Keys.read(settings.api_key_file))
        self.journal = Journal(settings.log_dir, self.metrics.log_lost.inc) if settings.log_dir is not None else None
        self.batcher: Batcher[Guard, _Question, Defended] = Batcher(
            self._predict,
            size=lambda guard: self.max_batch,
            wait=settings.max_wait_ms / 1000,
            capacity=settings.queue,
            observer=self.metrics.batch,
            on_start=self._set_threads,
        )
        self.error: Exception | None = None
        self.last_reload: dict[str, Any] | None = None
        self.on_failure: Callable[[], None] | None = None
        self.stopping = False
        self._open = guard if callable(guard) else None
        self._guard: Guard | None = None if callable(guard) else guard
        self._loading: asyncio.Task[None] | None = None
        self._reloading: asyncio.Lock | None = None
        self.small = Pool(settings.queue, "more requests are waiting than can be answered in time: try later", 1)
        self.slow = Pool(_SLOW_WAITING + 1, "others wait for this already: try again in a moment", 5)

    # -- beginning and end --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the threads and begin to load the database; returns before it is loaded."""
        self._reloading = asyncio.Lock()
        self.small.threads = ThreadPoolExecutor(self.settings.limits.max_decoders, "nndefense-work")
        self.slow.threads = ThreadPoolExecutor(1, "nndefense-slow", self._set_threads)
        # Before anything is opened: a guard measures its net with the threads that it will have.
        self._set_threads()
        self.batcher.start()
        if self._guard is not None:
            self._serve(self._guard)
        else:
            self._loading = asyncio.create_task(self._load_first())

    async def loaded(self) -> None:
        """Wait until the first guard serves; raises why it cannot."""
        if self._loading is not None:
            await self._loading
        if self.error is not None:
            raise self.error

    async def stop(self) -> None:
        """Finish what was accepted, then end the threads."""
        self.stopping = True
        if self._loading is not None and not self._loading.done():
            # A thread cannot be interrupted; what it opens is thrown away.
            self._loading.cancel()
            with suppress(asyncio.CancelledError):
                await self._loading
        self.batcher.close()
        await asyncio.to_thread(self.batcher.join, self.settings.grace)
        for pool in (self.small, self.slow):
            if pool.threads is not None:
                pool.threads.shutdown(wait=False, cancel_futures=True)
        if self.journal is not None:
            await asyncio.to_thread(self.journal.close)

    @property
    def ready(self) -> bool:
        """Whether the database and the classifier are loaded and verified, and requests are taken."""
        return self._guard is not None and not self.stopping

    @property
    def alive(self) -> bool:
        """Whether the thread that predicts runs."""
        return self.batcher.alive

    @property
    def guard(self) -> Guard:
        """The guard that serves now.

        Raises:
            ServiceProblem: ``not_ready``, while the first one is being loaded.
        """
        if self._guard is None:
            raise busy("not_ready", "the database is still being loaded and verified: try again in a moment", 2)
        return self._guard

    @property
    def max_batch(self) -> int:
        """Images in one batch."""
        return self.settings.max_batch or MAX_BATCH

    # -- work ---------------------------------------------------------------------------------------------------

    async def submit(
        self, images: Sequence[Tensor], top: int = 5, neighbors: int | None = None, *, guard: Guard | None = None
    ) -> list[Defended]:
        """Classify images in the next batches.

        Args as for :meth:`~nndefense.guard.Guard.predict`, and:
            images: tensors C x H x W in [0, 1] of the guard's input shape.
            guard: with which guard: the one that the images were decoded for. None: the one that serves now.

        Raises:
            ServiceProblem: ``queue_full``, ``timed_out``, ``stopping`` or ``not_ready``.
        """
        guard = guard or self.guard
        wanted = guard.k if neighbors is None else min(neighbors, guard.k)
        questions = [_Question(image, top, wanted) for image in images]
        found = await self.batcher.submit(guard, questions, self.settings.timeout)
        self.metrics.predicted(found)
        return found

    # -- replacing the guard ------------------------------------------------------------------------------------

    async def reload(self) -> dict[str, Any]:
        """Open the database (and the keys) again, and replace the guard that serves only where all is well.

        What was accepted before is finished with the old guard. One reload runs at a time, others wait for it.

        Returns:
            ``database``, ``model``, ``changed`` and ``seconds``.

        Raises:
            ServiceProblem: ``reload_failed``; the old guard keeps serving.
        """
        if self._open is None:
            raise ServiceProblem("reload_failed", "this service was started with a guard, not with a database to open")
        assert self._reloading is not None, "the state is not started"
        async with self._reloading:
            begun = time.monotonic()
            before = None if self._guard is None else self._guard.database.fingerprint
            try:
                keys = Keys.read(self.settings.api_key_file)
                guard = await asyncio.to_thread(self._opened)
            except Exception as error:
                raise self._failed(error) from error
            self._serve(guard)
            self.gate.keys = keys
            self.metrics.reloads.labels("succeeded").inc()
            self.last_reload = {
                "ok": True,
                "database": guard.database.fingerprint,
                "model": guard.fingerprint,
                "changed": guard.database.fingerprint != before,
                "seconds": round(time.monotonic() - begun, 3),
            }
            _log.info("reloaded: database %s", guard.database.fingerprint[:12])
            return self.last_reload

    def _failed(self, error: Exception) -> ServiceProblem:
        self.metrics.reloads.labels("failed").inc()
        # The log says everything; an answer names the kind of fault but no file.
        known = isinstance(error, NNDefenseError)
        _log.error("the reload failed, the old database keeps serving: %s", error, exc_info=not known)
        kind = type(error).__name__ if known else "an unexpected error"
        problem = ServiceProblem(
            "reload_failed", f"{kind}; the server's log says which file and why. Nothing has changed"
        )
        self.last_reload = {"ok": False, "error": problem.detail}
        return problem

    async def _load_first(self) -> None:
        try:
            self._serve(await asyncio.to_thread(self._opened))
        except Exception as error:
            self.error = error
            if self.on_failure is not None:
                self.on_failure()
            else:
                _log.error("the database could not be loaded: %s", error)

    def _serve(self, guard: Guard) -> None:
        guard.observe = self.metrics.observe
        self._guard = guard
        self.metrics.ready.set(1)
        self.metrics.serving(guard.database.fingerprint, guard.fingerprint)

    # -- in the worker threads ----------------------------------------------------------------------------------

    def _opened(self) -> Guard:
        assert self._open is not None
        self._set_threads()
        return self._open()

    def _predict(self, guard: Guard, questions: list[_Question]) -> list[Defended]:
        top = max(one.top for one in questions)
        neighbors = max(one.neighbors for one in questions)
        images = torch.stack([one.image for one in questions])
        found = guard.predict(images, top=top, neighbors=neighbors, batch_size=self.max_batch)
        return [
            answer if (one.top, one.neighbors) == (top, neighbors) else answer.limited(one.top, one.neighbors)
            for one, answer in zip(questions, found, strict=True)
        ]

    def _set_threads(self) -> None:
        if self.settings.threads is None:
            return
        torch.set_num_threads(self.settings.threads)
        # FAISS keeps the number for each thread, so it is set where the searches run.
        with suppress(ImportError):
            import faiss

            faiss.omp_set_num_threads(self.settings.threads)
