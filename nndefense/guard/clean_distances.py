"""Calibrating: how far clean images lie from the database, and that they are what they must be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from nndefense.datasets import ImageDataset, SubsetDataset
from nndefense.errors import DataError
from nndefense.guard.batch_invariant import Vectors
from nndefense.guard.nearest_rows import NearestRows

_SAMPLES = 64
# An image nearer to a row than this share of its own vector's length is that row's image, but for rounding.
_SAME = 1e-3
# Real data sets hold a few images twice; more than this share of them are no accident.
_FEW = 0.05


def clean_distances(
    dataset: ImageDataset, batches: Iterable[Tensor], vectors_of: Callable[[Tensor], Vectors], nearest: NearestRows
) -> tuple[float, ...]:
    """The distance of every image to its nearest row, ascending.

    Args:
        dataset: the images.
        batches: the same, n x C x H x W at a time and in order.
        vectors_of: turns a batch into vectors n x d.
        nearest: finds their rows.

    Raises:
        DataError: no images, or images that stand in the database, under their own id or (more than one in twenty) as
            copies under another.
    """
    database, distances, copies = nearest.database, list[float](), 0
    for batch in batches:
        vectors = vectors_of(batch)
        rows, near = nearest(vectors)
        same = near[:, 0] <= _SAME * np.linalg.norm(vectors, axis=1)
        ids = database.ids(rows[:, 0])
        for place in np.flatnonzero(same):
            if ids[place] == dataset.ids[len(distances) + int(place)]:
                raise DataError(
                    f"images of {dataset.name} stand in the database {database.path} (such as {ids[place]}): "
                    "calibrate on images that do not"
                )
        copies += int(same.sum())
        distances += near[:, 0].tolist()
    if not distances:
        raise DataError(f"{dataset.name} has no images to calibrate on: give another data set")
    if copies > max(1, _FEW * len(distances)):
        raise DataError(
            f"{copies:,} of the {len(distances):,} images of {dataset.name} are copies of images in the database "
            f"{database.path}: calibrate on images that do not stand in it"
        )
    return tuple(sorted(distances))


def record(dataset: ImageDataset, specs: Sequence[str]) -> dict[str, Any]:
    """What opens the data set again: its name, fingerprint and specs, and the ids where it is a part of them."""
    ids = {"ids": list(dataset.ids)} if specs and isinstance(dataset, SubsetDataset) else {}
    return {"name": dataset.name, "fingerprint": dataset.fingerprint, "specs": list(specs), **ids}


def some_ids(dataset: ImageDataset) -> tuple[str, ...]:
    """At most 64 of the ids, evenly from the first to the last."""
    count = min(_SAMPLES, len(dataset))
    return tuple(dataset.ids[i * len(dataset) // count] for i in range(count))
