"""Whether the parts of a database belong together, and digests for the records of older versions, which have none."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from nndefense.database import ImageDatabase, Manifest, classifier_of, source_of
from nndefense.database.database import check_classifier
from nndefense.database.manifest import FORMAT, NAME, standing_beside
from nndefense.database.writer import writing
from nndefense.defenses.quilting.patches import PatchManifest
from nndefense.defenses.stored import chosen_values, stored_calibration, stored_rule
from nndefense.errors import InputError, ModelError
from nndefense.files import read_json, write_json
from nndefense.guard.percentile import FILE, Percentile
from nndefense.models import Classifier, checkpoint, racnn
from nndefense.models import files as models_files
from nndefense.models.racnn import load_racnn


def check_parts(database: ImageDatabase, classifier: Classifier | None = None) -> dict[str, Any]:
    """Check that calibration, guard and, where it is given, classifier belong to a database.

    Returns:
        ``calibrated``: what was chosen of the rule, or None. ``rule``: the whole of it, and in words as ``text``.
        ``guard``: the number of its distances, or None. ``classifier``: its fingerprint where it was compared, or None.

    Raises:
        DatabaseError, DataError: naming the part that does not.
    """
    folder, manifest = database.path, database.manifest
    calibration, guard = stored_calibration(folder, manifest), _guard(folder, manifest)
    if guard is not None:
        guard.check_database(folder, manifest)
    if classifier is not None:
        database.check_classifier(classifier)
    rule = stored_rule(folder, manifest, calibration)
    return {
        "calibrated": chosen_values(calibration) or None,
        "rule": rule.to_json() | {"text": str(rule)},
        "guard": None if guard is None else len(guard),
        "classifier": None if classifier is None else classifier.fingerprint,
    }


def seal_records(path: Path, classifier: str | Path | None = None) -> list[Path]:
    """Give the records of older versions a digest of their values; what stands beside a database is bound to it.

    All that can be compared is compared before. Nothing is built again, and interrupted at any moment, everything opens
    as it did.

    Args:
        path: a database, whose classifier is taken along where it is a folder; the folder of a classifier, an RA-CNN or
            patches; or a file of the guard's distances.
        classifier: of a database, where it is; by default where its manifest says.

    Returns:
        The records that are sealed now.

    Raises:
        NNDefenseError: what is damaged or does not belong together.
        InputError: nothing of that kind.
    """
    with warnings.catch_warnings():
        # That there is no digest is why this runs.
        warnings.simplefilter("ignore")
        if path.is_file():
            Percentile.read(path).write(path)
            return [path]
        if (path / racnn.DESCRIPTION_FILE).is_file():
            return _seal_racnn(path)
        if (path / NAME).is_file():
            return _seal_database(path, classifier) if is_database(path) else _seal_patches(path)
        if (path / checkpoint.DESCRIPTION_FILE).is_file():
            return _seal_classifier(path)
        raise InputError(f"{path} is no database, classifier, RA-CNN or guard's file: give one of these")


def is_database(path: Path) -> bool:
    """Whether there is the manifest of an image database, and not of patches or nothing at all."""
    found = read_json(path / NAME) if (path / NAME).is_file() else None
    return isinstance(found, dict) and found.get("format") == FORMAT


def _seal_patches(folder: Path) -> list[Path]:
    manifest = PatchManifest.read(folder)
    manifest.check_files(folder)
    manifest.write(folder)
    return [folder / NAME]


def _seal_database(folder: Path, source: str | Path | None) -> list[Path]:
    read = Manifest.read(folder)
    manifest = replace(read, beside=standing_beside(folder))
    manifest.check_files(folder, checksums=True)
    stored_calibration(folder, manifest)
    guard = _guard(folder, manifest)
    if guard is not None:
        guard.check_database(folder, read)
    try:
        found = Path(source or source_of(folder, read))
    except ModelError:
        # It stands elsewhere, and is compared when the database is opened with it.
        found = folder
    if (found / checkpoint.DESCRIPTION_FILE).is_file():
        check_classifier(folder, manifest, classifier_of(folder, read, found, device="cpu"))
        sealed = _seal_classifier(found)
    else:
        sealed = []
    with writing(folder):
        if guard is not None and guard.manifest != manifest.identity:
            # The guard first: so bound it fits the manifest as it still is, too.
            write_json(folder / FILE, replace(guard, manifest=manifest.identity).to_json())
        replace(manifest, beside=standing_beside(folder)).write(folder)
    return [folder / NAME, *(folder / name for name in manifest.beside), *sealed]


def _guard(folder: Path, manifest: Manifest) -> Percentile | None:
    value = manifest.read_beside(folder, FILE)
    return None if value is None else Percentile.of_values(value, folder / FILE)


def _seal_classifier(folder: Path) -> list[Path]:
    checkpoint.seal_folder(folder)
    return [folder / checkpoint.DESCRIPTION_FILE]


def _seal_racnn(folder: Path) -> list[Path]:
    path = folder / racnn.DESCRIPTION_FILE
    load_racnn(folder)
    record, _ = models_files.read_json(path, racnn.FORMAT, racnn.VERSION, "copy the folder again")
    models_files.write_json(path, record)
    return [path, *_seal_classifier(folder / racnn.NET_FOLDER)]
