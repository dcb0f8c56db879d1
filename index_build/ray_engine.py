"""The stages extract and add on a Ray cluster: the same shards and parts, made by processes on many machines.

Ray Data hands the numbers of shards to a pool of actors, each of which prepares classifier and images once; parts of
the index are made by Ray's tasks. A worker that is lost is replaced by Ray and its shard made again. What is made is
written into the shared folder by the workers; the process that builds keeps the lock and everything else.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import itertools
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from index_build import add as adding
from index_build import extract as extracting
from index_build import pieces
from index_build.job import BuildJob
from index_build.ray_worker import Attempts, Extractor, Work, heard, tell_part
from nndefense.database import cluster
from nndefense.datasets import ImageDataset
from nndefense.errors import DatabaseError, InputError, check_choice
from nndefense.models import Classifier

R = TypeVar("R")
ENGINES = ("local", "ray")
ATTEMPTS = 5
"""How many workers may be lost over one shard or part before the build gives up."""
_SEEN_SECONDS = 90.0
_PIP = 'pip install "ray[data,serve]"'


class RayEngine:
    """Workers of a cluster that this process is connected to; use :func:`engine_of`.

    Attributes:
        workers: how many make shards, or parts, at the same time; None for one for each machine, or GPU.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers
        self._ray = cluster.import_ray()
        self._open: list[Any] = []

    def close(self) -> None:
        """End what is under way. A worker may finish its piece, but begins no other."""
        while self._open:
            self._open.pop().close()

    def shards(
        self,
        job: BuildJob,
        dataset: ImageDataset,
        classifier: Classifier,
        exclude: ImageDataset | None = None,
        *,
        readers: int | None = None,
    ) -> extracting.Make:
        """What makes shards for :func:`~index_build.extract.extract`.

        Args:
            job: a job that has begun.
            dataset, classifier, exclude: of it. They are sent to the workers. Each worker has a GPU to itself where the
                classifier is on one.
            readers: threads in each worker that read and decode; None for one for each of its processors.
        """

        def make(numbers: Sequence[int]) -> Generator[extracting.ShardReport, None, None]:
            if not numbers:
                return
            gpu = classifier.device.type == "cuda"
            workers, cpus = share_out(self._machines(), self.workers, gpu=gpu)
            work = Work(
                job=_absolute(job),
                dataset=dataset,
                classifier=copy.deepcopy(classifier).cpu() if gpu else classifier,
                exclude=exclude,
                readers=readers or cpus,
                device="cuda" if gpu else "cpu",
                folder=os.getcwd(),
                attempts=ATTEMPTS,
            )
            with self._lost("shard"):
                # Held here while the pool lives: an actor that is started again fetches it again.
                attempts = self._ray.remote(Attempts).options(num_cpus=0, max_restarts=-1).remote()
                held = [self._ray.put(work), attempts]
                texts = _pooled(held, numbers, workers=min(workers, len(numbers)), cpus=cpus, gpu=gpu)
                try:
                    for text in texts:
                        report = heard(text, extracting.ShardReport)
                        for target in work.job.targets:
                            await_piece(work.job.path(target, report.number))
                        yield report
                finally:
                    # Workers finish what Ray has given to them already, unless they cannot begin it.
                    self._ray.kill(attempts)
                    texts.close()

        return self._kept(make)

    def parts(self, folder: Path, *, device: str = "cpu") -> adding.Make:
        """What makes parts of the index for :func:`~index_build.add.add`.

        Args:
            folder: of the unfinished build.
            device: where to add; any but the CPU gives each task a GPU to itself.
        """

        def make(numbers: Sequence[int]) -> Generator[adding.PartReport, None, None]:
            if not numbers:
                return
            job, gpu = _absolute(BuildJob.read(folder)), device != "cpu"
            _, cpus = share_out(self._machines(), self.workers, gpu=gpu)
            remote = self._ray.remote(tell_part).options(
                num_cpus=cpus, num_gpus=1 if gpu else 0, max_retries=ATTEMPTS, scheduling_strategy="SPREAD"
            )
            where = "cuda" if gpu else "cpu"
            pending = [remote.remote(job, number, where, cpus, adding.PART_ROWS) for number in numbers]
            try:
                with self._lost("part of the index"):
                    while pending:
                        done, pending = self._ray.wait(pending)
                        report = heard(self._ray.get(done[0]), adding.PartReport)
                        await_piece(job.targets[0].folder / adding.part_name(report.number))
                        yield report
            finally:
                for task in pending:
                    self._ray.cancel(task, force=True)

        return self._kept(make)

    def _kept(
        self, make: Callable[[Sequence[int]], Generator[R, None, None]]
    ) -> Callable[[Sequence[int]], Iterator[R]]:
        def start(numbers: Sequence[int]) -> Iterator[R]:
            # An error of the caller's own keeps the generator alive as long as its traceback.
            self._open.append(make(numbers))
            started: Iterator[R] = self._open[-1]
            return started

        return start

    def _machines(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    @contextmanager
    def _lost(self, what: str) -> Iterator[None]:
        """Say in one line that Ray has given up."""
        errors = (self._ray.exceptions.RayError, importlib.import_module("ray.data.exceptions").SystemException)
        try:
            yield
        except errors as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
            raise DatabaseError(
                f"the workers could not make a {what} ({reason}): look at the machines' memory and at Ray's logs, then "
                "run the same command again; finished pieces are kept"
            ) from error


@contextmanager
def engine_of(engine: str, *, address: str | None = None, workers: int | None = None) -> Iterator[RayEngine | None]:
    """Connect to a cluster for the time of a build, where that is asked for.

    A cluster that is started here, on this machine alone, ends with it; one that was joined, or that the process is
    connected to already, stays.

    Args:
        engine: ``local``: there is none, and nothing of Ray is loaded; or ``ray``.
        address: ``HOST:PORT`` of the cluster to join; None starts one.
        workers: processes that make shards, or parts, at the same time; they share the cluster's processors. None: one
            for each machine, or each GPU where the classifier is on one.

    Raises:
        InputError: another engine, options without it, or Ray (or Ray Data) is not installed.
        DatabaseError: the cluster cannot be reached or started.
    """
    check_choice("the engine", engine, ENGINES)
    if engine == "local":
        if address is not None or workers is not None:
            raise InputError("a Ray address and a number of Ray's workers are for the engine 'ray': add --engine ray")
        yield None
        return
    if workers is not None and workers < 1:
        raise InputError(f"a build on Ray needs at least 1 worker, not {workers}")
    for name in ("ray", "pandas", "pyarrow"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--engine ray needs {name}, which is not installed: {_PIP}")
    began = cluster.join(address)
    workshop = RayEngine(workers)
    try:
        yield workshop
    finally:
        workshop.close()
        if began:
            cluster.leave()


def share_out(machines: Sequence[Mapping[str, float]], workers: int | None, *, gpu: bool) -> tuple[int, int]:
    """How many workers a cluster gets, and how many processors each of them.

    Args:
        machines: what each machine has, as Ray counts it: ``CPU`` and ``GPU``.
        workers: how many are asked for; None for one for each GPU, or, without ``gpu``, for each machine.
        gpu: whether each needs a GPU.

    Returns:
        Workers, and the most processors that every one of them can have.

    Raises:
        DatabaseError: there are not so many processors or GPUs.
    """
    held = [(int(machine.get("CPU", 0)), int(machine.get("GPU", 0))) for machine in machines]
    if workers is None:
        workers = sum(min(gpus, cpus) if gpu else 1 for cpus, gpus in held if cpus) or 1
    for each in range(max((cpus for cpus, _ in held), default=0), 0, -1):
        if sum(min(cpus // each, gpus) if gpu else cpus // each for cpus, gpus in held) >= workers:
            return workers, each
    what = f"{sum(cpus for cpus, _ in held)} processors" + (f" and {sum(g for _, g in held)} GPUs" if gpu else "")
    raise DatabaseError(
        f"the Ray cluster has {what}, too few for {workers} workers of at least 1{' of both' if gpu else ''}: ask for "
        "fewer, or wait until its machines are there"
    )


def await_piece(path: Path, seconds: float = _SEEN_SECONDS) -> None:
    """Wait until this machine sees a piece that a worker has finished: a network file system may take a while.

    Raises:
        DatabaseError: it does not come.
    """
    end = time.monotonic() + seconds
    for pause in itertools.chain([0.01, 0.1], itertools.repeat(1.0)):
        if pieces.finished(path) is not None:
            return
        if time.monotonic() >= end:
            raise DatabaseError(
                f"a worker has written {path}, but it is not here: all machines of the cluster must see the same "
                "folder under the same path, on a shared file system"
            )
        time.sleep(pause)
        # Listing a folder makes NFS ask anew for what it has taken to be missing.
        os.listdir(path.parent)


def _absolute(job: BuildJob) -> BuildJob:
    targets = tuple(replace(target, folder=target.folder.resolve()) for target in job.targets)
    return replace(job, targets=targets)


def _pooled(
    held: list[Any], numbers: Sequence[int], *, workers: int, cpus: int, gpu: bool
) -> Generator[str, None, None]:
    """Let a pool of Ray Data's actors make shards; what they tell comes as it is made."""
    data = importlib.import_module("ray.data")
    log = logging.getLogger("ray.data")
    level, context = log.level, data.DataContext.get_current()
    bars = context.enable_progress_bars
    log.setLevel(logging.ERROR)
    # A data set of Ray's keeps the settings that it was made with.
    context.enable_progress_bars = False
    try:
        told = data.from_items([{"id": number} for number in numbers], override_num_blocks=len(numbers)).map_batches(
            Extractor,
            batch_size=1,
            batch_format="numpy",
            compute=data.ActorPoolStrategy(size=workers),
            fn_constructor_args=(held,),
            num_cpus=cpus,
            num_gpus=1 if gpu else None,
        )
        context.enable_progress_bars = bars
        rows = iter(told.iter_rows())
        try:
            for row in rows:
                yield str(row["told"])
        finally:
            # This ends the pool, also where not all was asked for.
            rows.close()
    finally:
        context.enable_progress_bars = bars
        log.setLevel(level)
