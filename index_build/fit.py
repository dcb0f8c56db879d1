"""Fit: what is learnt from a sample: the PCA before rows are made, the index's trained parts once they are there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from index_build import pieces
from index_build.extract import Extracted, bar, read_extracted, rejection_limit
from index_build.job import BuildJob, Options
from index_build.mapper import Mapper
from index_build.reader import read
from nndefense.database.index_training import check_factory, choose_index, sample_rows, train_index, training_rows
from nndefense.database.rows import sample_of
from nndefense.datasets import ImageDataset
from nndefense.errors import DataError, InputError
from nndefense.features import PCA, FeatureSpec, fit_pca

TRAINED = "index-trained.faiss"
_PROBED = 1000


def probe_images(dataset: ImageDataset, positions: NDArray[np.int64], count: int) -> Tensor:
    """The first ``count`` images at these positions that can be read, or as many as there are.

    Raises:
        DataError: none of the first thousand can be read, or the source is gone.
    """
    found: list[Tensor] = []
    reason = ""
    for first in range(0, min(len(positions), _PROBED + count), count):
        for batch in read(dataset, positions[first : first + count], count, workers=1):
            found.append(batch.images)
            if batch.rejected:
                reason = reason or f": {batch.rejected[0].id}: {batch.rejected[0].reason}"
        if sum(map(len, found)) >= count:
            break
    images = torch.cat(found)[:count] if found else torch.empty(0)
    if not len(images):
        raise DataError(f"no image of {dataset.name} can be used{reason}")
    return images


def reduced_length(feature: FeatureSpec, length: int) -> int:
    """The length of a feature's final vectors, given that of the raw ones."""
    return min(feature.pca, length) if needs_pca(feature, length) else length


def needs_pca(feature: FeatureSpec, length: int) -> bool:
    """Whether raw vectors of this length are reduced or whitened."""
    return bool(feature.pca) and (feature.whiten or length > feature.pca)


def fit_pcas(
    mapper: Mapper,
    dataset: ImageDataset,
    lengths: Sequence[int],
    options: Options,
    *,
    max_rejected: int | str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> list[PCA | None]:
    """Fit the PCA of every feature that needs one, on the same sample of images.

    Memory holds the sample's raw vectors.

    Raises:
        DataError: the source is gone, or too many of the sample's images are unreadable.
        InputError: too few images for a PCA of that dimension, or values that are not finite.
    """
    needed = [needs_pca(feature, length) for feature, length in zip(mapper.features, lengths, strict=True)]
    if not any(needed):
        return [None] * len(needed)
    chosen = sample_rows(len(dataset), options.pca_sample, options.seed)
    limit = rejection_limit(max_rejected, len(dataset))
    samples = [
        torch.empty((len(chosen) if wanted else 0, length)) for wanted, length in zip(needed, lengths, strict=True)
    ]
    rejected = held = 0
    with bar(len(chosen), "sampling for PCA", progress) as shown:
        for batch in read(dataset, chosen, options.batch_size, workers=workers):
            rejected += len(batch.rejected)
            if limit is not None and rejected > limit:
                first = batch.rejected[0]
                raise DataError(
                    f"over {limit:,} of the {len(dataset):,} images of {dataset.name} cannot be used, more than "
                    f"--max-rejected allows; one of them is {first.id}: {first.reason}"
                )
            if len(batch.ids):
                mapped = mapper(batch.under_noise(options.row_noise, options.seed))
                fine = mapped.finite()
                last = held + int(fine.sum())
                for sample, wanted, vectors in zip(samples, needed, mapped.vectors, strict=True):
                    if wanted:
                        sample[held:last] = vectors[fine]
                held = last
            if shown is not None:
                shown.update(len(batch.ids) + len(batch.rejected))
    if not held:
        raise InputError(f"the classifier gives NaN or infinite values for every image of {dataset.name}")
    pcas: list[PCA | None] = []
    for feature in mapper.features:
        # Let go of when the next one comes.
        sample = samples.pop(0)
        pcas.append(fit_pca(sample[:held], feature) if len(sample) else None)
    return pcas


@dataclass(frozen=True)
class Fitted:
    """The trained index without rows.

    Attributes:
        factory: FAISS's factory string, as given or chosen.
        why: why it was chosen; empty where it was given.
        mergeable: whether parts of it can be made and merged.
        inputs: a sha256 of the rows that it was fitted on.
    """

    factory: str
    why: str
    mergeable: bool
    inputs: str


def fit_index(folder: Path, *, device: str = "cpu") -> Fitted:
    """Choose the index where ``auto`` was asked for, and train it on a sample of the rows of an unfinished build.

    Args:
        folder: the build's folder.
        device: where to train; ``auto`` chooses more inverted lists where that is a GPU.

    Returns:
        What there is now; fitted before on the same rows, nothing is done.

    Raises:
        DatabaseError: the folder holds no unfinished build, or its rows are not complete.
        InputError: FAISS cannot build such an index, or from so few rows.
    """
    job = BuildJob.read(folder)
    target, found = job.targets[0], read_extracted(folder)
    inputs = rows_key(job, found)
    path = folder / TRAINED
    standing = fitted(folder)
    if standing is not None and standing.inputs == inputs:
        return standing
    factory, why = job.options.index, ""
    if factory == "auto":
        choice = choose_index(found.rows, target.dimension, memory=job.options.memory, gpu=device != "cpu")
        factory, why = choice.factory, choice.why
    mergeable = check_factory(factory, target.dimension)
    wanted = training_rows(factory, target.dimension, found.rows)
    sample: NDArray[Any] = np.empty((0, target.dimension), np.float32)
    if wanted:
        shards = {name: entry.rows for name, entry in found.files.items() if entry.rows}
        chosen = sample_rows(found.rows, wanted, job.options.seed)
        sample = sample_of([folder / name for name in shards], list(shards.values()), "features", chosen)
    index = train_index(factory, target.dimension, sample, device=device, seed=job.options.seed)
    made = Fitted(factory, why, mergeable, inputs)
    pieces.finish(path, index.write, **vars(made))
    return made


def fitted(folder: Path) -> Fitted | None:
    """The trained index of an unfinished build, if there is one."""
    piece = pieces.finished(folder / TRAINED, checksum=True)
    return None if piece is None else Fitted(**piece.notes)


def rows_key(job: BuildJob, found: Extracted) -> str:
    """A sha256 of the rows' checksums and of the index's settings: what was made from others is made again."""
    settings = (job.options.index, job.options.memory, job.options.seed)
    text = "".join(f"{name} {entry.sha256}\n" for name, entry in sorted(found.files.items()) if entry.rows)
    return hashlib.sha256(f"{settings}\n{text}".encode()).hexdigest()
