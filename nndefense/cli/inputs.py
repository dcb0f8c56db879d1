"""Opening what the commands work on, and checking that its parts fit together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nndefense.database import ImageDatabase, Manifest
from nndefense.datasets import ImageDataset, concatenate, holdout, open_dataset, open_recorded
from nndefense.defenses import NearestNeighborDefense
from nndefense.defenses.stored import store_calibration as store_calibration
from nndefense.defenses.stored import stored_calibration as stored_calibration
from nndefense.errors import DataError, InputError, ModelError, NNDefenseError
from nndefense.images import shape_text
from nndefense.models import Classifier, load_classifier


def open_classifier(
    source: str,
    *,
    device: str,
    data_dir: Path | None = None,
    classes: Path | None = None,
    input_shape: tuple[int, int, int] | None = None,
    specs: Sequence[str] = (),
    database: Path | None = None,
) -> Classifier:
    """Load a classifier.

    Unless ``input_shape`` is given, it takes images of the shape that ``database`` was made with, where its net can;
    one of the user's own, where there is no database, those of the first data set of ``specs``.
    """
    made = shape_in_database(database) if database is not None and input_shape is None else None
    if source.startswith("python:") and input_shape is None:
        input_shape = made or (open_dataset(specs[0], data_dir=data_dir).shape if specs else None)
    classifier = load_classifier(source, device=device, input_shape=input_shape, classes=classes)
    # A net for other images is left as it is: whoever compares its fingerprint can say better what is wrong.
    if made is not None and made[0] == classifier.input_shape[0] and not classifier.fixed_size:
        classifier.input_shape = made
    return classifier


def open_datasets(
    specs: Sequence[str],
    *,
    data_dir: Path | None = None,
    like: Classifier | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> ImageDataset:
    """Open one or several data sets as one, in the size and channels that a classifier takes.

    ``limit`` keeps that many images, drawn at random.
    """
    if not specs:
        raise DataError("no data set was named: give --dataset")
    channels, size = (like.input_shape[0], like.input_shape[1:]) if like is not None else (None, None)
    opened = [open_dataset(spec, data_dir=data_dir, size=size, channels=channels) for spec in specs]
    dataset = opened[0] if len(opened) == 1 else joined(opened)
    return dataset if limit is None else drawn(dataset, limit, seed)


def joined(datasets: Sequence[ImageDataset]) -> ImageDataset:
    """Several data sets as one; their ids must not collide, or a row of a database could not be told from another."""
    dataset = concatenate(list(datasets))
    if len(set(dataset.ids)) != len(dataset):
        raise DataError(
            f"two of {dataset.name} hold images with the same id: open folders that are laid out alike as splits of "
            "one folder (imagefolder:PATH:SPLIT)"
        )
    return dataset


def drawn(dataset: ImageDataset, limit: int, seed: int) -> ImageDataset:
    """At most ``limit`` images, drawn at random without replacement, in their own order."""
    if limit < 1:
        raise InputError(f"the limit is {limit}, but must be at least 1")
    if limit >= len(dataset):
        return dataset
    return dataset.subset(np.sort(np.random.default_rng(seed).permutation(len(dataset))[:limit]))


def split(
    specs: Sequence[str],
    calibration: str | None,
    n_holdout: int,
    *,
    data_dir: Path | None,
    like: Classifier | None,
    seed: int,
) -> tuple[ImageDataset, ImageDataset, ImageDataset]:
    """Open the database's images and set apart those to calibrate on.

    Returns:
        All database images; those of them that candidates are built from; the calibration images: a data set of
        their own where ``calibration`` names one, else ``n_holdout`` of the first set, held out.
    """
    first, others = open_datasets(specs[:1], data_dir=data_dir, like=like), None
    if len(specs) > 1:
        others = open_datasets(specs[1:], data_dir=data_dir, like=like)
    rows = first if others is None else joined([first, others])
    if calibration is not None:
        held = open_datasets([calibration], data_dir=data_dir, like=like)
        check_disjoint(held, rows)
        return rows, rows, held
    kept, held_out = holdout(first, n_holdout, seed)
    rest = first.subset(kept) if others is None else joined([first.subset(kept), others])
    return rows, rest, first.subset(held_out)


def check_disjoint(dataset: ImageDataset, other: ImageDataset) -> None:
    """Raise :class:`DataError` where images to be classified stand in the database, and would find themselves.

    Items with equal ids are compared by their pixels (64 of them at most), since folders laid out alike give equal
    ids to different images. Copies under another id are not looked for.
    """
    shared = sorted(set(dataset.ids).intersection(other.ids))[:64]
    if not shared or dataset.shape != other.shape:
        return
    ours, _ = dataset.batch([dataset.index_of(name) for name in shared])
    theirs, _ = other.batch([other.index_of(name) for name in shared])
    same = [name for name, a, b in zip(shared, ours, theirs, strict=True) if torch.equal(a, b)]
    if same:
        raise DataError(
            f"images of {dataset.name} stand in {other.name} too (such as {same[0]}), which would hand the defence "
            "their answers: use other images"
        )


def check_not_in_database(dataset: ImageDataset, defense: NearestNeighborDefense) -> None:
    """As :func:`check_disjoint`, for a database whose images are not at hand: by features instead of pixels.

    An image that stands in the database is its own nearest neighbour, at a distance of 0 but for rounding.
    """
    database = defense.database
    shared = sorted(set(dataset.ids).intersection(database.ids(np.arange(len(database)))))[:64]
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
            f"images of {dataset.name} stand in the database {database.path} too (such as {same[0]}), which would hand "
            "the defence their answers: use other images"
        )


def check_not_calibrated_on(dataset: ImageDataset, calibration: dict[str, Any] | None, folder: Path) -> None:
    """Raise :class:`DataError` where the setting was chosen on images that are to be reported."""
    shared = sorted(set((calibration or {}).get("ids", ())).intersection(dataset.ids))
    if shared:
        raise DataError(
            f"the setting of {folder} was calibrated on {len(shared)} images of {dataset.name} (such as {shared[0]}), "
            "which would flatter it: report on other images"
        )


def check_surrogate(surrogate: Classifier, classifier: Classifier) -> None:
    """Raise :class:`ModelError` where a surrogate does not take the images that the classifier takes."""
    try:
        surrogate.check_shape((1, *classifier.input_shape))
    except InputError:
        raise ModelError(
            f"the surrogate {surrogate.source} takes images {shape_text(surrogate.input_shape)}, but the classifier "
            f"{shape_text(classifier.input_shape)}: give a surrogate for the same images"
        ) from None


def shape_in_database(folder: Path) -> tuple[int, int, int]:
    """The image shape that a database's classifier takes."""
    channels, height, width = Manifest.read(folder).classifier["input_shape"]
    return channels, height, width


def open_defense(
    classifier: Classifier, folder: Path, k: int | None, weighting: str | None
) -> tuple[NearestNeighborDefense, dict[str, Any] | None]:
    """The defence over a database; K and weighting as given, else as calibrated, else 50 and ``cbw-d``."""
    database = ImageDatabase.open(folder, classifier=classifier)
    calibration = stored_calibration(folder)
    chosen: dict[str, Any] = (
        calibration["chosen"] if calibration else {"k": min(50, len(database)), "weighting": "cbw-d"}
    )
    changed = k is not None or weighting is not None
    defense = NearestNeighborDefense(classifier, database, k or chosen["k"], weighting or chosen["weighting"])
    return defense, None if changed else calibration


def neighbor_pictures(database: ImageDatabase, data_dir: Path | None, like: Classifier) -> ImageDataset | None:
    """The images that a database was built from, where they can be opened again; otherwise None."""
    try:
        return open_recorded(
            database.manifest.data, lambda: database.ids(database.row_numbers), like.input_shape, data_dir
        )
    except NNDefenseError:
        # The pictures only illustrate; the report says that they are not at hand.
        return None
