"""Data sets one after another, as one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nndefense.datasets.base import ImageDataset, update_with_strings
from nndefense.datasets.ids import JoinedIds
from nndefense.datasets.rejected import BadImage
from nndefense.errors import DataError, InputError
from nndefense.images import shape_text


class ConcatenatedDataset(ImageDataset):
    """Several data sets one after another; made by :func:`concatenate`."""

    def __init__(self, parts: Sequence[ImageDataset], *, name: str) -> None:
        self.parts = tuple(parts)
        classes = tuple(dict.fromkeys(label for part in self.parts for label in part.classes))
        numbers = {label: number for number, label in enumerate(classes)}
        self._starts = np.cumsum([0, *map(len, self.parts)], dtype=np.int64)
        labels = []
        for part in self.parts:
            # One entry more than classes: label -1 (unknown) picks the last one, which is -1 again.
            renumber = np.array([*(numbers[label] for label in part.classes), -1], dtype=np.int64)
            labels.append(renumber[part.labels])
        super().__init__(
            name=name,
            classes=classes,
            shape=self.parts[0].shape,
            ids=JoinedIds([part.ids for part in self.parts]),
            labels=np.concatenate(labels),
        )

    def _read(self, rows: NDArray[np.int64]) -> Tensor:
        images = torch.empty((len(rows), *self.shape))
        for part, places, inner in self._by_part(rows):
            images[torch.from_numpy(places)] = part._read(inner)
        return images

    def read_into(
        self, rows: NDArray[np.int64], images: Tensor, digests: NDArray[np.uint8] | None = None
    ) -> dict[int, BadImage]:
        """As for every data set: see :meth:`ImageDataset.read_into`."""
        wrong: dict[int, BadImage] = {}
        for part, places, inner in self._by_part(rows):
            read = torch.empty((len(inner), *self.shape))
            hashed = None if digests is None else np.empty((len(inner), digests.shape[1]), dtype=np.uint8)
            found = part.read_into(inner, read, hashed)
            images[torch.from_numpy(places)] = read
            if digests is not None and hashed is not None:
                digests[places] = hashed
            wrong.update({int(places[place]): error for place, error in found.items()})
        return wrong

    def _by_part(self, rows: NDArray[np.int64]) -> Iterator[tuple[ImageDataset, NDArray[np.int64], NDArray[np.int64]]]:
        """For each part that has some of the rows: the part, their places in ``rows``, and their rows in the part."""
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        for owner in np.unique(owners).tolist():
            places = np.flatnonzero(owners == owner)
            yield self.parts[owner], places, rows[places] - self._starts[owner]

    def _digest(self) -> str:
        digest = hashlib.sha256(b"concatenation\n")
        update_with_strings(digest, [part.fingerprint for part in self.parts])
        update_with_strings(digest, self.classes)
        return digest.hexdigest()


def concatenate(datasets: Sequence[ImageDataset], name: str | None = None) -> ImageDataset:
    """Join data sets of one image shape. Classes are the union by name, in order of first appearance.

    Ids are kept as they are; where two items have the same id, :meth:`ImageDataset.index_of` gives the first.

    Raises:
        InputError: ``datasets`` is empty.
        DataError: the data sets have images of different shapes.
    """
    if not datasets:
        raise InputError("give at least one data set to concatenate")
    first = datasets[0]
    if len(datasets) == 1 and name is None:
        return first
    for other in datasets[1:]:
        if other.shape != first.shape:
            raise DataError(
                f"{other.name} has images {shape_text(other.shape)}, but {first.name} {shape_text(first.shape)}: "
                "open both with the same size and channels"
            )
    return ConcatenatedDataset(datasets, name=name or " + ".join(dataset.name for dataset in datasets))
