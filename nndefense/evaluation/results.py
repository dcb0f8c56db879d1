"""The results file: what was measured, on what, with what."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nndefense.database import ImageDatabase
from nndefense.datasets import ImageDataset
from nndefense.defenses import NearestNeighborDefense
from nndefense.errors import DataError, warn
from nndefense.evaluation.audit import AuditLine
from nndefense.evaluation.evaluate import Record
from nndefense.evaluation.ladder import compare, worst_cases
from nndefense.evaluation.recipe import Recipe
from nndefense.files import read_json, sealed, unsealed
from nndefense.models import Classifier
from nndefense.versions import library_versions

FORMAT, VERSION = "nndefense-results", 2
NAME = "results.json"


def assemble(
    records: Sequence[Record],
    *,
    recipe: Recipe,
    dataset: ImageDataset,
    classifier: Classifier,
    surrogate: Classifier | None,
    defense: NearestNeighborDefense | None,
    calibration: dict[str, Any] | None,
    audit: Sequence[AuditLine],
    command: str,
    abstention: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Put everything that a reader needs beside the records; plain values, ready for JSON.

    The worst cases and the paired tests follow from the records, and stand among and beside them. ``recipe``,
    ``dataset``, ``classifier``, ``surrogate`` and ``defense`` are what was run, ``calibration`` how it was chosen,
    ``audit`` and ``abstention`` what was found beside, and ``command`` the line to run it again.
    """
    plain = [record.to_json() for record in records]
    plain += worst_cases(plain)
    gray = [rung.attack.name for rung in recipe.rungs if rung.threat_model == "gray"]
    results = {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "seed": recipe.seed,
        "recipe": {"sha256": recipe.sha256, **recipe.to_json()},
        "dataset": {
            "name": dataset.name,
            "n": len(dataset),
            "classes": list(dataset.classes),
            "fingerprint": dataset.fingerprint,
            "shape": list(dataset.shape),
        },
        "classifier": identity(classifier),
        "surrogate": identity(surrogate) if surrogate else None,
        "database": _described(defense.database) if defense is not None else None,
        "defense": {**defense.rule.settings, "text": str(defense.rule)} if defense is not None else None,
        "calibration": calibration,
        "headline": {
            "attack": (gray or [rung.attack.name for rung in recipe.rungs])[0],
            "norm": recipe.headline_norm,
            "eps": recipe.headline_eps,
        },
        "versions": library_versions(),
        "audit": [line.to_json() for line in audit],
        "comparisons": [comparison.to_json() for comparison in compare(plain)],
        "records": plain,
    }
    if abstention is not None:
        results["abstention"] = abstention
    return sealed(results)


def read_results(path: Path, form: str, version: int, what: str, command: str) -> dict[str, Any]:
    """Read a results file, whose values must be those that were written; of older ones, without a digest, it warns.

    Args:
        path: of the file.
        form, version: its entries ``format`` and ``version``.
        what: it holds, for the error: ``"the results of a comparison"``.
        command: that writes it.

    Raises:
        DataError: it is missing, damaged, changed or something else.
    """
    found: dict[str, Any] = read_json(path)
    if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (form, version):
        raise DataError(f"{path} does not hold {what}: run {command} again")
    try:
        checked = unsealed(found)[1]
    except ValueError:
        raise DataError(f"{path} has changed since it was written: restore it, or run {command} again") from None
    if not checked:
        warn(f"{path} was written before results had a digest, so that a change would go unnoticed: {command} adds one")
    return found


def _described(database: ImageDatabase) -> dict[str, Any]:
    return {
        "rows": len(database),
        "dimension": database.dimension,
        "layer": database.feature.layer,
        "pooling": database.feature.pooling,
        "feature": database.feature.to_json(),
        "index": database.manifest.index["factory"],
        "fingerprint": database.fingerprint,
        "data": database.manifest.data["name"],
        "path": str(database.path),
    }


def identity(classifier: Classifier) -> dict[str, str]:
    """What a classifier is, in three strings."""
    return {"source": classifier.source, "arch": classifier.arch, "fingerprint": classifier.fingerprint}
