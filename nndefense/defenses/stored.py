"""The calibrated setting, kept in a file beside the database that it was chosen for, and what holds without one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nndefense.database import ImageDatabase, Manifest, classifier_of
from nndefense.errors import DataError
from nndefense.files import read_json, write_json
from nndefense.models import Classifier
from nndefense.unwrapping import unwrapped

CALIBRATION_FILE = "calibration.json"
DEFAULT_WEIGHTING = "cbw-d"


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
        DatabaseError: a database that is missing, damaged or made with another classifier.
        ModelError: the classifier cannot be found or read.
        DataError: the stored calibration is damaged.
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
    calibration = stored_calibration(folder) if k is None or weighting is None else None
    chosen = calibration["chosen"] if calibration else {}
    return StoredDefense(
        classifier,
        opened,
        chosen.get("k", default_k(len(opened))) if k is None else k,
        chosen.get("weighting", DEFAULT_WEIGHTING) if weighting is None else weighting,
        calibration if k is None and weighting is None else None,
    )


def store_calibration(folder: Path, calibration: dict[str, Any]) -> None:
    """Keep the calibrated K and weighting beside the database that they were chosen for."""
    write_json(folder / CALIBRATION_FILE, calibration)


def stored_calibration(folder: Path) -> dict[str, Any] | None:
    """The calibration that stands beside a database, or None.

    Raises:
        DataError: the file is damaged or something else.
    """
    path = folder / CALIBRATION_FILE
    if not path.exists():
        return None
    value: dict[str, Any] = read_json(path)
    chosen = value.get("chosen") if isinstance(value, dict) else None
    if not isinstance(chosen, dict) or not isinstance(chosen.get("k"), int) or "weighting" not in chosen:
        raise DataError(f"{path} is not a calibration: remove it, or calibrate again")
    return value
