"""The calibrated setting, kept in a file beside the database that it was chosen for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nndefense.errors import DataError
from nndefense.files import read_json, write_json

CALIBRATION_FILE = "calibration.json"


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
