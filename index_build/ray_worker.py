"""What runs in Ray's processes for a build: an actor that makes shards, a task that makes a part of the index.

Both answer with text, an error included: one that is raised in another process comes as a traceback, and one that is
raised while Ray starts an actor is tried again and again.
"""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from index_build.add import PartReport, make_part
from index_build.extract import ShardReport, make_shard
from index_build.job import BuildJob
from index_build.mapper import ShardTools
from nndefense.database.cluster import import_ray
from nndefense.datasets import ImageDataset, SourceError
from nndefense.errors import DatabaseError, DataError, InputError, ModelError, NNDefenseError
from nndefense.models import Classifier

R = TypeVar("R", ShardReport, PartReport)
_KINDS = {kind.__name__: kind for kind in (SourceError, InputError, DataError, ModelError, DatabaseError)}


@dataclass(frozen=True)
class Work:
    """What a worker needs to make shards; it travels once to each machine.

    Attributes:
        job: whose folders have absolute paths.
        dataset: the images.
        classifier: on the CPU.
        exclude: images to keep out, or None.
        readers: threads that read and decode.
        device: where the worker computes.
        folder: the current folder of the process that builds, from which relative paths of images begin.
        attempts: workers that may be lost over one shard before the build gives up: it might be what ends them.
    """

    job: BuildJob
    dataset: ImageDataset
    classifier: Classifier
    exclude: ImageDataset | None
    readers: int
    device: str
    folder: str
    attempts: int


class Attempts:
    """An actor that counts how often each shard was begun. Ray Data tries again for ever, also what cannot work."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """Returns the number of times that a shard was begun, this one included."""
        self._begun[number] += 1
        return self._begun[number]


class Extractor:
    """Makes shards; the tools are made once, with the first."""

    def __init__(self, held: Sequence[Any]) -> None:
        """
        Args:
            held: a reference to a :class:`Work` in Ray's store, and the actor :class:`Attempts`.
        """
        self._held = held
        self._work: Work | None = None
        self._tools: ShardTools | None = None

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Make the shards of a batch's numbers; returns their reports, or errors, as text."""
        return {"told": np.array([told(partial(self.make, int(number))) for number in batch["id"]])}

    def make(self, number: int) -> ShardReport:
        """Make one shard.

        Raises:
            NNDefenseError: as :func:`~index_build.extract.make_shard` does; or the folder is not that of the build, or
                too many workers were lost over this shard.
        """
        ray = import_ray()
        work: Work = ray.get(self._held[0]) if self._work is None else self._work
        self._work = work
        if ray.get(self._held[1].begin.remote(number)) > work.attempts:
            first, last = work.job.bounds(number)
            raise DatabaseError(
                f"{work.attempts} workers were lost over the images {first} to {last - 1}, one after another: look at "
                "the machines' memory (fewer --ray-workers need less) and Ray's logs, then run the same command again"
            )
        check_folders(work.job)
        if self._tools is None:
            # Where it is missing, the images say what they miss.
            with suppress(OSError):
                os.chdir(work.folder)
            classifier = work.classifier.to(work.device)
            self._tools = ShardTools.of(work.job, work.dataset, classifier, work.exclude, workers=work.readers)
        # Looked again before anything is written: the build may have failed meanwhile, and another one begun there.
        return make_shard(work.job, number, self._tools, lambda: check_folders(work.job))


def tell_part(job: BuildJob, number: int, device: str, threads: int, part_rows: int) -> str:
    """Make one part of the index of a job's only target; returns its report, or an error, as text."""

    def make() -> PartReport:
        check_folders(job)
        return make_part(job.targets[0].folder, number, device=device, threads=threads, part_rows=part_rows)

    return told(make)


def check_folders(job: BuildJob) -> None:
    """Make sure that this machine sees the folders in which the build is going on.

    Raises:
        DatabaseError: one holds no build, or another one.
    """
    for target in job.targets:
        try:
            found: dict[str, Any] | None = BuildJob.read(target.folder).settings(target)
        except DatabaseError:
            found = None
        if found != job.settings(target):
            raise DatabaseError(
                f"{target.folder} does not hold the build there: all machines of the cluster must see the same folder "
                "under the same path, on a shared file system"
            )


def told(make: Callable[[], ShardReport | PartReport]) -> str:
    """What a call returns, or its error, as text."""
    try:
        return json.dumps({"report": asdict(make())})
    except NNDefenseError as error:
        kind = next((c.__name__ for c in type(error).__mro__ if c.__name__ in _KINDS), "DatabaseError")
        return json.dumps({"error": kind, "message": str(error), "host": socket.gethostname()})
    except Exception as error:
        # One that nobody expects, as of a model's own code: where it was raised is told too, for --debug.
        trace, text = traceback.format_exc(), " ".join(str(error).split())
        message = f"{type(error).__name__}: {text}"
        return json.dumps({"error": "", "message": message, "host": socket.gethostname(), "trace": trace})


def heard(text: str, kind: type[R]) -> R:
    """The report that a worker told.

    Raises:
        NNDefenseError: the error that it told, and on which machine; a DatabaseError for one that is none of this
            package's.
    """
    value = json.loads(text)
    if value.get("error") == "":
        raise DatabaseError(
            f"a worker on {value['host']} failed ({value['message']}): mend what it says, then run the same command "
            "again; finished pieces are kept"
        ) from RuntimeError(value["trace"])
    if "error" in value:
        raise _KINDS[value["error"]](f"a worker on {value['host']}: {value['message']}")
    report = value["report"]
    if kind is ShardReport:
        report["rejected"] = tuple(report["rejected"])
    return kind(**report)
