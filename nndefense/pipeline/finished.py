"""Work that may be finished already: databases and trainings are opened where they are, and made where they are not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from index_build import build_databases
from nndefense.database import ImageDatabase
from nndefense.datasets import ImageDataset
from nndefense.errors import DatabaseError
from nndefense.features import FeatureSpec
from nndefense.models import Classifier
from nndefense.training import train_classifier
from nndefense.training.progress import TrainingFolder


def find_or_build(
    rows: ImageDataset, classifier: Classifier, places: Mapping[Path, FeatureSpec], **options: Any
) -> list[ImageDatabase]:
    """Open finished databases of these very rows and features, and build the others from one forward pass.

    Args:
        rows: the images of all databases.
        classifier: that makes the features.
        places: for each folder the feature to be found there; what else stands in it is replaced.
        **options: more arguments of :func:`index_build.build_databases`.

    Returns:
        The databases in the order of ``places``.
    """
    found = {folder: _finished(folder, feature, rows, classifier) for folder, feature in places.items()}
    missing = {folder: places[folder] for folder, database in found.items() if database is None}
    if missing:
        made = build_databases(rows, classifier, missing, overwrite=True, **options)
        found |= dict(zip(missing, made, strict=True))
    return [database for database in found.values() if database is not None]


def _finished(folder: Path, feature: FeatureSpec, rows: ImageDataset, classifier: Classifier) -> ImageDatabase | None:
    try:
        found = ImageDatabase.open(folder, classifier=classifier)
    except DatabaseError:
        return None
    fits = found.feature == feature and found.manifest.data["fingerprint"] == rows.fingerprint
    return found if fits else None


def find_or_train(net: Classifier, images: ImageDataset, folder: Path, **options: Any) -> Classifier:
    """Train a net, go on where its training was stopped, or open it where it is finished.

    Args:
        net: with fresh weights; arguments and errors as for :func:`~nndefense.training.train_classifier`.
        images: to train on.
        folder: of the training.
        **options: more of its arguments.

    Raises:
        InputError: the folder holds a training with other settings.
    """
    place = TrainingFolder(folder)
    return train_classifier(net, images, out=folder, resume=place.is_unfinished() or place.is_finished(), **options)
