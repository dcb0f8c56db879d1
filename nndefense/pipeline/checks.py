"""That the parts of a measurement fit together: no image is measured that the defence was given, and no net misread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nndefense.datasets import ImageDataset
from nndefense.defenses import NearestNeighborDefense, RaCnnDefense
from nndefense.errors import DataError, InputError, ModelError
from nndefense.images import shape_text
from nndefense.models import Classifier


def check_disjoint(dataset: ImageDataset, other: ImageDataset) -> None:
    """Raise :class:`DataError` where images to be classified stand in the database, and would find themselves.

    Items with equal ids are compared by their pixels (64 of them at most), since folders laid out alike give equal
    ids to different images. Copies under another id are not looked for.

    Args:
        dataset: the images to be classified.
        other: the images of the database.
    """
    shared = sorted(set(dataset.ids).intersection(other.ids))[:64]
    if not shared or dataset.shape != other.shape:
        return
    ours, _ = dataset.batch([dataset.index_of(name) for name in shared])
    theirs, _ = other.batch([other.index_of(name) for name in shared])
    same = [name for name, a, b in zip(shared, ours, theirs, strict=True) if torch.equal(a, b)]
    if same:
        raise DataError(
            f"images of {dataset.name} stand in {other.name} too (such as {same[0]}), which would give their answers "
            "away: use other images"
        )


def check_not_in_database(
    dataset: ImageDataset,
    defense: NearestNeighborDefense | RaCnnDefense,
    pictures: ImageDataset | None = None,
) -> None:
    """Raise :class:`DataError` where images to be classified stand in the defence's database.

    Where the database's images are at hand (``pictures``), they are compared as by :func:`check_disjoint`; else by
    features: an image that stands in the database is its own nearest neighbour, at a distance of 0 but for rounding.

    Args:
        dataset: the images to be classified.
        defense: with its database.
        pictures: the database's images, or None.
    """
    if pictures is not None:
        check_disjoint(dataset, pictures)
        return
    database = defense.database
    shared = sorted(set(dataset.ids).intersection(database.ids(database.row_numbers)))[:64]
    if not shared:
        return
    images, _ = dataset.batch([dataset.index_of(name) for name in shared])
    with torch.no_grad():
        vectors = defense.extractor(images.to(defense.classifier.device)).cpu()
    distances, rows = database.search(vectors, 1)
    near = distances[:, 0] <= 1e-3 * vectors.norm(dim=1)
    same = [name for name, found, hit in zip(shared, database.ids(rows), near, strict=True) if hit and found == name]
    if same:
        raise DataError(
            f"images of {dataset.name} stand in the database {database.path} too (such as {same[0]}), which would give "
            "their answers away: use other images"
        )


def check_not_calibrated_on(dataset: ImageDataset, calibration: dict[str, Any] | None, folder: Path) -> None:
    """Raise :class:`DataError` where the setting was chosen on images that are to be reported.

    Args:
        dataset: the images to be reported.
        calibration: plain values, with the ``ids`` that it was made on; None where nothing was calibrated.
        folder: of the database, for the message.
    """
    shared = sorted(set((calibration or {}).get("ids", ())).intersection(dataset.ids))
    if shared:
        raise DataError(
            f"the setting of {folder} was calibrated on {len(shared)} images of {dataset.name} (such as {shared[0]}), "
            "which would flatter it: report on other images"
        )


def check_surrogate(surrogate: Classifier | None, classifier: Classifier) -> None:
    """Raise :class:`ModelError` where a surrogate, if there is one, does not take the classifier's images."""
    try:
        if surrogate is not None:
            surrogate.check_shape((1, *classifier.input_shape))
    except InputError:
        assert surrogate is not None
        other, size = surrogate.input_shape, ",".join(map(str, classifier.input_shape[1:]))
        train = f" (nndefense train --size {size} makes one)" if other[1:] != classifier.input_shape[1:] else ""
        raise ModelError(
            f"the surrogate {surrogate.source} takes images {shape_text(other)}, but the classifier "
            f"{shape_text(classifier.input_shape)}: give a surrogate for the same images{train}"
        ) from None
