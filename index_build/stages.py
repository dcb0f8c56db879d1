"""The stages one by one, each holding the folder's lock: what the subcommands of ``nndefense index`` call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from index_build import add as adding
from index_build.extract import Extracted
from index_build.fit import Fitted, fit_index
from index_build.job import NAME, BuildJob
from index_build.ray_engine import engine_of
from index_build.runner import BuildSettings, building, extracted, finish
from nndefense.database import ImageDatabase
from nndefense.database.manifest import Manifest
from nndefense.datasets import ImageDataset
from nndefense.errors import DatabaseError, InputError
from nndefense.features import FeatureSpec
from nndefense.models import Classifier

if TYPE_CHECKING:
    from typing_extensions import Unpack

Vectors = NDArray[np.float32]


@contextmanager
def _unfinished(folder: Path) -> Iterator[BuildJob]:
    """The unfinished build of a folder, with its lock held."""
    # Asked before the lock, which would make the folder.
    BuildJob.read(folder)
    with building([folder]):
        yield BuildJob.read(folder)


def extract(
    dataset: ImageDataset, classifier: Classifier, feature: FeatureSpec, out: Path, **settings: Unpack[BuildSettings]
) -> Extracted:
    """Begin a build, or take up the one that is there, and extract its rows.

    Arguments and errors are those of :func:`~index_build.runner.build_databases`, but for ``index_device``.

    Returns:
        The rows and what was rejected; the folder holds an unfinished build.
    """
    with extracted(dataset, classifier, {out: feature}, **settings) as (job, found, _):
        made = adding.sealed(out, job.settings(job.targets[0]))
        return found[0] if made is None else Extracted(made.rows, made.rejected, made.files)


def fit(folder: Path, *, index: str | None = None, memory: int | None = None, device: str = "cpu") -> Fitted:
    """Fit the index of an unfinished build on its rows; see :func:`~index_build.fit.fit_index`.

    Args:
        folder: the build's folder.
        index: a FAISS factory string or ``auto``, where it is to be another one than the build was begun with.
        memory: likewise, the bytes that it may take.
        device: where to train.

    Raises:
        DatabaseError: no unfinished build, or its rows are not complete, or its index is merged already.
        InputError: FAISS cannot build such an index, or from so few rows.
    """
    with _unfinished(folder) as job:
        asked = replace(
            job.options, index=index or job.options.index, memory=memory if memory is not None else job.options.memory
        )
        if asked != job.options:
            if adding.sealed(folder, job.settings(job.targets[0])):
                raise DatabaseError(f"the index of {folder} is merged: verify it, or build again with another one")
            replace(job, options=asked).write()
        return fit_index(folder, device=device)


def add(
    folder: Path,
    *,
    workers: int = 1,
    device: str = "cpu",
    engine: str = "local",
    ray_address: str | None = None,
    ray_workers: int | None = None,
    progress: bool = True,
) -> int:
    """Make the parts of the index of an unfinished build.

    Args:
        folder, workers, device, progress: as for :func:`~index_build.add.add`; ``workers`` is for the local engine.
        engine, ray_address, ray_workers: as for :func:`~index_build.runner.build_databases`.

    Raises:
        InputError, DatabaseError: as those do.
    """
    with _unfinished(folder), engine_of(engine, address=ray_address, workers=ray_workers) as ray:
        make = ray.parts(folder, device=device) if ray else None
        return adding.add(folder, workers=workers, device=device, make=make, progress=progress)


def merge(folder: Path) -> Manifest:
    """Make one index of the parts, and the manifest; see :func:`~index_build.add.merge`."""
    with _unfinished(folder):
        return adding.merge(folder)


def verify(
    folder: Path,
    *,
    recall: float | None = None,
    k: int | None = None,
    queries: Vectors | None = None,
    queries_from: str = "",
) -> dict[str, Any]:
    """Check a database, measure its index where asked for, and finish an unfinished build.

    See :func:`~index_build.runner.finish`.

    Raises:
        DatabaseError: naming what is wrong and what to do.
        InputError: a recall, K or queries out of range.
    """
    if recall is None and k is None and queries is None and not (folder / NAME).exists():
        # Nothing is written, so a copy on a read-only disk can be checked too.
        return finish(folder)
    Manifest.read(folder)
    with building([folder]):
        return finish(folder, recall=recall, k=k, queries=queries, queries_from=queries_from)


def vectors_of(
    database: ImageDatabase, classifier: Classifier, images: ImageDataset, *, batch_size: int = 64
) -> Vectors:
    """The feature vectors of images to look for in a database: n x d float32.

    Raises:
        DatabaseError: the database was made with another classifier.
        DataError: images that cannot be read.
        InputError: there are none.
    """
    if not len(images):
        raise InputError(f"{images.name} has no images to look for: name another set")
    images = images.usable
    extractor, device = database.extractor(classifier), classifier.device
    with torch.no_grad():
        made = [extractor(batch.to(device)).cpu().numpy() for batch, _, _ in images.batches(batch_size)]
    return np.concatenate(made).astype(np.float32)
