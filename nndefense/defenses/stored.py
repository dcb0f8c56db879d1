"""The calibrated setting, kept in a file beside the database that it was chosen for, and what holds without one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nndefense.database import WEIGHTINGS, ImageDatabase, Manifest, classifier_of
from nndefense.database.manifest import CALIBRATION
from nndefense.database.rule import DEFAULT_WEIGHTING
from nndefense.errors import DatabaseError
from nndefense.models import Classifier
from nndefense.unwrapping import unwrapped


def default_k(rows: int) -> int:
    """K where nothing was calibrated or asked for: 50, or all rows of a smaller database."""
    return min(50, rows)


@dataclass(frozen=True)
class StoredDefense:
    """What a defence is made of, as its database's folder says.

    Attributes:
        classifier: the one that the database was made with.
        database: opened.
        k, weighting: as asked for, else as calibrated, else :func:`default_k` and ``cbw-d``.
        calibration: what they were chosen from; None where they were not, or others were asked for.
    """

    classifier: Classifier
    database: ImageDatabase
    k: int
    weighting: str
    calibration: dict[str, Any] | None


def open_stored(
    database: str | Path | ImageDatabase,
    classifier: str | Path | Classifier | None = None,
    *,
    k: int | None = None,
    weighting: str | None = None,
    device: str = "auto",
    classes: str | Path | None = None,
    input_shape: tuple[int, int, int] | None = None,
    verify: bool = True,
) -> StoredDefense:
    """Open a database with its classifier and its setting: the one rule for every part of the library.

    Args:
        database: its folder, or a database that is open.
        classifier: the classifier or where it comes from. None: as for :func:`~nndefense.database.classifier_of`.
        k, weighting: in the place of the calibrated ones.
        device, classes, input_shape: of a classifier that is not open yet.
        verify: as for :meth:`~nndefense.database.ImageDatabase.open`.

    Raises:
        DatabaseError: a database that is missing, damaged or made with another classifier, or whose calibration is.
        ModelError: the classifier cannot be found or read.
    """
    opened = database if isinstance(database, ImageDatabase) else None
    folder = Path(database).expanduser() if not isinstance(database, ImageDatabase) else database.path
    if isinstance(classifier, nn.Module):
        classifier = unwrapped(classifier)
    else:
        manifest = opened.manifest if opened is not None else Manifest.read(folder)
        classifier = classifier_of(
            folder, manifest, classifier, device=device, classes=classes, input_shape=input_shape
        )
    if opened is None:
        opened = ImageDatabase.open(folder, classifier=classifier, verify=verify)
    calibration = stored_calibration(folder, opened.manifest) if k is None or weighting is None else None
    chosen = calibration["chosen"] if calibration else {}
    return StoredDefense(
        classifier,
        opened,
        chosen.get("k", default_k(len(opened))) if k is None else k,
        chosen.get("weighting", DEFAULT_WEIGHTING) if weighting is None else weighting,
        calibration if k is None and weighting is None else None,
    )


def stored_calibration(folder: Path, manifest: Manifest | None = None) -> dict[str, Any] | None:
    """The calibration that a database was made with, or None.

    Args:
        folder: the database's.
        manifest: its manifest, where that was read.

    Raises:
        DatabaseError: the file is missing though there was one, has changed, or is none of this database.
    """
    manifest, path = manifest or Manifest.read(folder), folder / CALIBRATION
    value: dict[str, Any] | None = manifest.read_beside(folder, CALIBRATION)
    if value is None:
        return None
    chosen = value.get("chosen") if isinstance(value, dict) else None
    if (
        not isinstance(chosen, dict)
        or type(chosen.get("k")) is not int
        or not 1 <= chosen["k"] <= manifest.rows
        or chosen.get("weighting") not in WEIGHTINGS
    ):
        raise DatabaseError(f"{path} is not a calibration of this database: remove it, or calibrate again")
    feature = {name: chosen[name] for name in ("layer", "pooling") if name in chosen}
    if feature != {name: manifest.feature[name] for name in feature}:
        raise DatabaseError(f"{path} was chosen for another layer or pooling than the database has: calibrate again")
    return value
