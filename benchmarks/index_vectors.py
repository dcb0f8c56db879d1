"""Vectors made by rule, clustered as features are: any row can be made again without the others.

Classes with sub-classes, and inside each a cloud; all three with the spectrum that features have after a PCA, where the
i-th coordinate varies like 1/sqrt(i).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
PIECE = 50_000
CLASSES, SUBCLASSES = 1000, 8
QUERIES = 1 << 40
"""The number of the first row that belongs to no set of rows."""


def piece(first: int, count: int, dimension: int) -> NDArray[np.float32]:
    """``count`` rows from row ``first``, a multiple of 50,000: count x dimension float32."""
    spectrum = (np.arange(1, dimension + 1) ** -0.5).astype(np.float32)
    laid = np.random.default_rng([dimension, 0])
    classes = laid.standard_normal((CLASSES, dimension), dtype=np.float32) * spectrum
    below = 0.5 * laid.standard_normal((CLASSES, SUBCLASSES, dimension), dtype=np.float32) * spectrum
    chance = np.random.default_rng([dimension, 1, first])
    which, sub = chance.integers(0, CLASSES, count), chance.integers(0, SUBCLASSES, count)
    cloud = np.float32(0.5) * chance.standard_normal((count, dimension), dtype=np.float32) * spectrum
    return np.asarray(classes[which] + below[which, sub] + cloud, dtype=np.float32)


def pieces(rows: int, dimension: int) -> Iterator[NDArray[np.float32]]:
    """All rows in order, 50,000 at a time."""
    for first in range(0, rows, PIECE):
        yield piece(first, min(PIECE, rows - first), dimension)


def queries(count: int, dimension: int) -> NDArray[np.float32]:
    """Vectors of the same kind that are no rows."""
    return piece(QUERIES, count, dimension)
