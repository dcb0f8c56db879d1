"""What a process needs in hand to make shards: the images, the classifier, the fitted PCAs, the images to keep out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from index_build import pieces
from index_build.job import BuildJob, BuildTarget
from index_build.mapper import Mapper
from nndefense.database.near_images import NearSearch
from nndefense.database.writer import PCA_FILE, load_pca
from nndefense.datasets import ImageDataset
from nndefense.errors import DatabaseError
from nndefense.features import PCA
from nndefense.models import Classifier


@dataclass(frozen=True)
class ShardTools:
    """Made once in a process, for all shards that it makes.

    Attributes:
        dataset: the images.
        mapper: classifier and layers, in the precision of the job.
        pcas: for each target its PCA, on the mapper's results' device (the CPU), or None.
        numbers: the data set's class numbers as the classifier's, and -1 at the end, where the label -1 finds it.
        near: finds images that are to be kept out, or None.
        workers: threads that read and decode; None for one for each CPU.
    """

    dataset: ImageDataset
    mapper: Mapper
    pcas: Sequence[PCA | None]
    numbers: Tensor
    near: NearSearch | None = None
    workers: int | None = None

    @classmethod
    def of(
        cls,
        job: BuildJob,
        dataset: ImageDataset,
        classifier: Classifier,
        exclude: ImageDataset | None = None,
        *,
        workers: int | None = None,
    ) -> ShardTools:
        """Prepare to work on a job that has begun; what is given must be what it was begun with.

        Raises:
            DatabaseError: a PCA that is missing or damaged.
        """
        features = [target.feature for target in job.targets]
        chosen = job.precision
        mapper = Mapper(
            classifier.eval(),
            features,
            classifier.device,
            precision=chosen["precision"],
            channels_last=chosen["channels_last"],
        )
        near = None
        if exclude is not None and job.excluded is not None:
            near = NearSearch(exclude, job.excluded["eps"], device=classifier.device)
        return cls(
            dataset,
            mapper,
            [pca_of(target) for target in job.targets],
            label_numbers(dataset, classifier),
            near,
            workers,
        )

    def labels(self, labels: Tensor) -> Tensor:
        """The data set's class numbers as the classifier's; -1 stays -1."""
        return self.numbers[labels].to(labels)


def label_numbers(dataset: ImageDataset, classifier: Classifier) -> Tensor:
    """For each class of the data set its number among the classifier's, and -1 at the end.

    Raises:
        ModelError: a class that is none of the classifier's.
    """
    known = classifier.label_map(dataset.classes).cpu() if dataset.classes else torch.empty(0, dtype=torch.int64)
    return torch.cat([known, torch.tensor([-1])])


def pca_of(target: BuildTarget) -> PCA | None:
    """The PCA of a target of a job that has begun.

    Raises:
        DatabaseError: it is missing or damaged.
    """
    if not target.pca:
        return None
    path = target.folder / PCA_FILE
    if pieces.finished(path, checksum=True) is None:
        raise DatabaseError(f"{path} is missing or damaged: begin the build again with --overwrite")
    return load_pca(path)
