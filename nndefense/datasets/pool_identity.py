"""What tells one pool of images from another, whatever its labels."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from nndefense.datasets.base import ImageDataset, update_with_strings
from nndefense.errors import DataError

_SAMPLE = 64
_BLOCK = 8192


def pool_identity(pool: ImageDataset) -> dict[str, Any]:
    """What tells one pool from another, whatever its labels: number, shape, all ids and 64 evenly spaced images.

    Pixels are rounded to 8 bits, and a hash of each image says which one has changed.
    """
    ids = hashlib.sha256()
    for start in range(0, len(pool), _BLOCK):
        update_with_strings(ids, pool.ids[start : start + _BLOCK])
    images = hashlib.sha256()
    picked = np.unique(np.linspace(0, len(pool) - 1, min(len(pool), _SAMPLE)).astype(np.int64))
    if len(picked):
        images.update((pool.batch(picked)[0] * 255).round().byte().numpy().tobytes())
    return {
        "name": pool.name,
        "n": len(pool),
        "shape": list(pool.shape),
        "ids_sha256": ids.hexdigest(),
        "images_sha256": images.hexdigest(),
    }


def check_pool(pool: ImageDataset, made: dict[str, Any]) -> None:
    """Raise :class:`DataError` unless ``pool`` is the one that ``made`` (a :func:`pool_identity`) describes."""
    given = pool_identity(pool)
    names = {"n": "number of images", "shape": "shape", "ids_sha256": "ids", "images_sha256": "pixels"}
    changed = [what for key, what in names.items() if given[key] != made.get(key)]
    if changed:
        raise DataError(
            f"{pool.name} is not the pool that was labelled ({made.get('name')}, {made.get('n')} images): other "
            f"{' and '.join(changed)}; open that pool as it was, or label this one"
        )
