"""Pools of unlabelled images for self-training: with labels dropped, split off a labelled set, or pseudo-labelled."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from nndefense.datasets import ImageDataset
from nndefense.datasets.base import pool_identity, shuffle_keys, update_with_strings
from nndefense.errors import DataError, InputError


class _Relabelled(ImageDataset):
    """Another data set's images and ids under other labels; the true ones are neither kept nor hashed."""

    def __init__(self, images: ImageDataset, name: str, classes: Sequence[str], labels: ArrayLike) -> None:
        self._images = images
        super().__init__(name=name, classes=classes, shape=images.shape, ids=images.ids, labels=labels)

    def _read(self, rows: NDArray[np.int64]) -> Tensor:
        return self._images._read(rows)

    def _digest(self) -> str:
        identity = pool_identity(self._images)
        digest = hashlib.sha256(f"relabelled {identity['ids_sha256']} {identity['images_sha256']}\n".encode())
        digest.update(self.labels.astype("<i8").tobytes())
        update_with_strings(digest, self.classes)
        return digest.hexdigest()


class UnlabelledDataset(_Relabelled):
    """Images whose labels were dropped: all -1, without classes. Made by :func:`without_labels`.

    Its fingerprint depends on ids and pixels alone, so nothing of the true labels passes on.
    """

    def __init__(self, images: ImageDataset) -> None:
        super().__init__(images, images.name, (), np.full(len(images), -1, dtype=np.int64))


class PseudoLabelledDataset(_Relabelled):
    """Images under pseudo-labels, an ordinary labelled data set to whoever trains on it.

    Made by :meth:`nndefense.training.pseudo_labels.PseudoLabels.dataset`.

    Attributes:
        confidence: float32 n, of each label in [0, 1].
    """

    def __init__(
        self, images: ImageDataset, labels: ArrayLike, confidence: NDArray[np.float32], classes: Sequence[str]
    ) -> None:
        super().__init__(images, f"{images.name} with pseudo-labels", classes, labels)
        self.confidence = confidence
        if len(self.labels) and self.labels.min() < 0:
            raise DataError(f"{self.name} lacks some labels: select labelled images first")


def without_labels(dataset: ImageDataset) -> ImageDataset:
    """Return the same images and ids with every label -1 and without classes."""
    return dataset if isinstance(dataset, UnlabelledDataset) else UnlabelledDataset(dataset)


def complement(dataset: ImageDataset, n: int, seed: int = 0) -> tuple[ImageDataset, ImageDataset]:
    """Split a labelled set into n labelled images and a pool of all others without their labels.

    This stands in for unlabelled data where none is at hand (Raghunathan et al. 2020, sweep of the sample size). The
    classes get equal shares of n, the remainder going to classes drawn by the seed; a class with too few images gives
    all that it has, and the others make up for it. With one seed, the labelled images of a smaller n are among those
    of a larger one.

    Args:
        dataset: N images; those without a label go to the pool.
        n: from 1 to the number of labelled images, less than N.
        seed: of the draw.

    Returns:
        The n labelled images and the N - n others, both in the order of the data set.

    Raises:
        InputError: n is out of range.
    """
    known = int((dataset.labels >= 0).sum())
    if not 1 <= n <= min(known, len(dataset) - 1):
        raise InputError(
            f"cannot take {n} labelled images from {dataset.name}, which has {known} of them: "
            f"choose from 1 to {min(known, len(dataset) - 1)}, so that a pool remains"
        )
    rows = balanced_rows(dataset.labels, n, seed)
    rest = np.ones(len(dataset), dtype=np.bool_)
    rest[rows] = False
    return (
        dataset.subset(rows, name=f"{dataset.name} ({n} labelled, seed {seed})"),
        without_labels(dataset.subset(rest, name=f"{dataset.name} (all but {n} labelled, seed {seed})")),
    )


def balanced_rows(labels: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    """Draw n rows, as equally many of each label as there are; ascending. Rows of label -1 are left out."""
    keys = shuffle_keys(len(labels), seed)
    members = [np.flatnonzero(labels == value) for value in np.unique(labels[labels >= 0])]
    drawn = [rows[np.argsort(keys[rows], kind="stable")] for rows in members]
    # Place 0 of every class, then place 1, ...: the first n of this order are balanced, and those of a smaller n too.
    place = np.concatenate([np.arange(len(rows)) for rows in drawn])
    turn = np.argsort(shuffle_keys(len(drawn), seed), kind="stable").argsort(kind="stable")
    rank = np.concatenate([np.full(len(rows), turn[number]) for number, rows in enumerate(drawn)])
    order = np.lexsort((rank, place))
    return np.sort(np.concatenate(drawn)[order[:n]]).astype(np.int64)
