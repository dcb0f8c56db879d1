"""The K nearest rows of a feature vector, the same whatever other vectors are searched for with it.

An index finds candidates only. Its float32 distances come from matrix products, which round differently in batches of
different sizes; so the distances are worked out again from the rows, each on its own and in float64, and the order is
that of (distance, row).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nndefense.database import ImageDatabase
from nndefense.datasets import ImageDataset, SubsetDataset
from nndefense.errors import DataError
from nndefense.guard.batch_invariant import Vectors

Rows = NDArray[np.int64]
Distances = NDArray[np.float64]

_UNIT = 2.0**-24
_MORE = 8
# Numbers that are held at once while distances are worked out.
_PIECE = 1 << 21


class NearestRows:
    """Searches one database for K rows.

    With an exact index a few more candidates than K are asked for, and the answer is proven: a row that is not among
    them cannot be nearer than the K-th, by the largest error that rounding in float32 can make. Where the proof fails,
    more are asked for, and at last every row is looked at. An index that is not exact (IVF, HNSW, ...) is asked for K
    rows, one vector at a time, because its search too can depend on the batch.
    """

    def __init__(self, database: ImageDatabase, k: int) -> None:
        self.database, self.k = database, k
        self.exact = database.exact

    def __call__(self, vectors: NDArray[np.float32]) -> tuple[Rows, Distances]:
        """Vectors N x d -> row numbers N x K and Euclidean distances N x K, nearest first."""
        if not self.exact:
            found = [self.database.search(vector[None], self.k)[1].numpy() for vector in vectors]
            return _sorted(np.concatenate(found), self._distances(vectors, np.concatenate(found)), self.k)
        rows, distances, proven = self._candidates(vectors, self.k + max(_MORE, self.k // 4))
        for more in (8 * (self.k + _MORE), None):
            open_ = np.flatnonzero(~proven)
            if not len(open_):
                break
            if more is None:
                for i in open_:
                    rows[i], distances[i] = self._every(vectors[i])
            else:
                rows[open_], distances[open_], proven[open_] = self._candidates(vectors[open_], more)
        return rows, distances

    def _candidates(self, vectors: NDArray[np.float32], count: int) -> tuple[Rows, Distances, NDArray[np.bool_]]:
        """The K nearest of ``count`` candidates, and whether no other row can be among them."""
        count = min(count, len(self.database))
        seen, found = (part.numpy() for part in self.database.search(vectors, count))
        rows, distances = _sorted(found, self._distances(vectors, found), self.k)
        if count == len(self.database):
            return rows, distances, np.ones(len(rows), np.bool_)
        # The index's square of a distance D is off by at most gamma (2 |x| + D)^2 (Higham 2002, section 3.1: inner
        # products of d terms in any order, with some operations more). It was at least ``seen`` for every row left out.
        terms = vectors.shape[1] + 16
        gamma = terms * _UNIT / (1 - terms * _UNIT)
        length = np.sqrt(np.square(vectors.astype(np.float64)).sum(1))
        kth = distances[:, -1]
        bound = np.square(kth) + gamma * np.square(2 * length + kth)
        return rows, distances, bound < np.square(seen[:, -1].astype(np.float64)) * (1 - 4 * _UNIT)

    def _every(self, vector: NDArray[np.float32]) -> tuple[Rows, Distances]:
        """The K nearest of all rows."""
        numbers: NDArray[Any] = self.database.row_numbers
        size = max(_PIECE // len(vector), 1)
        rows, distances = np.empty((1, 0), np.int64), np.empty((1, 0))
        for first in range(0, len(numbers), size):
            piece = numbers[None, first : first + size]
            near = self._distances(vector[None], piece)
            rows, distances = _sorted(np.hstack([rows, piece]), np.hstack([distances, near]), self.k)
        return rows[0], distances[0]

    def _distances(self, vectors: NDArray[np.float32], rows: Rows) -> Distances:
        """Euclidean distances of N vectors to rows of their own, N x M, in float64."""
        out = np.empty(rows.shape)
        step = max(_PIECE // (rows.shape[1] * vectors.shape[1]), 1)
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            there = self.database.features(rows[part]).numpy().astype(np.float64)
            there -= vectors[part, None]
            # Along contiguous numbers NumPy adds each row's in an order of its own that the other rows do not change.
            out[part] = np.sqrt(np.square(there, out=there).sum(2))
        return out


def _sorted(rows: Rows, distances: Distances, k: int) -> tuple[Rows, Distances]:
    """The k nearest of each line; of equally near rows, the one with the lower number comes first."""
    order = np.lexsort((rows, distances), axis=1)[:, :k]
    return np.take_along_axis(rows, order, 1), np.take_along_axis(distances, order, 1)


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
