"""The results file: what was measured, on what, with what."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from nndefense.database import ImageDatabase
from nndefense.datasets import ImageDataset
from nndefense.evaluation.evaluate import Record
from nndefense.evaluation.threats import AttackSettings
from nndefense.models import Classifier
from nndefense.versions import library_versions

FORMAT, VERSION = "nndefense-results", 1
NAME = "results.json"


def assemble(
    records: Sequence[Record],
    *,
    dataset: ImageDataset,
    classifier: Classifier,
    surrogate: Classifier | None,
    database: ImageDatabase,
    k: int,
    weighting: str,
    attack: AttackSettings,
    headline_eps: float,
    calibration: dict[str, Any] | None,
    command: str,
    seed: int,
) -> dict[str, Any]:
    """Put everything that a reader needs beside the records; plain values, ready for JSON."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "seed": seed,
        "dataset": {
            "name": dataset.name,
            "n": len(dataset),
            "classes": list(dataset.classes),
            "fingerprint": dataset.fingerprint,
            "shape": list(dataset.shape),
        },
        "classifier": identity(classifier),
        "surrogate": identity(surrogate) if surrogate else None,
        "database": {
            "rows": len(database),
            "dimension": database.dimension,
            "layer": database.feature.layer,
            "pooling": database.feature.pooling,
            "feature": database.feature.to_json(),
            "index": database.manifest.index["factory"],
            "fingerprint": database.fingerprint,
            "data": database.manifest.data["name"],
            "path": str(database.path),
        },
        "defense": {"k": k, "weighting": weighting},
        "calibration": calibration,
        "attack": attack.to_json(),
        "headline": {"attack": attack.name, "norm": attack.norm, "eps": headline_eps},
        "versions": library_versions(),
        "records": [record.to_json() for record in records],
    }


def identity(classifier: Classifier) -> dict[str, str]:
    """What a classifier is, in three strings."""
    return {"source": classifier.source, "arch": classifier.arch, "fingerprint": classifier.fingerprint}


def summary(results: dict[str, Any]) -> str:
    """The table of clean, gray and black accuracies at the headline radius, as text for a terminal."""
    eps, cells = results["headline"]["eps"], {}
    for record in results["records"]:
        if record["threat_model"] == "clean" or record["eps"] == eps:
            cells[record["defense"], record["threat_model"]] = record
    names = list(dict.fromkeys(record["defense"] for record in results["records"]))
    width = max(len(name) for name in names)
    columns = ("clean", "gray", "black")
    lines = [
        f"{results['dataset']['name']}: accuracy on {results['dataset']['n']:,} images [95 % interval]; "
        f"{results['headline']['attack'].upper()} at {results['headline']['norm']} {eps:g}"
    ]
    lines.append(" " * width + "".join(f"  {column:<22}" for column in columns).rstrip())
    for name in names:
        texts = []
        for column in columns:
            record = cells.get((name, column))
            texts.append(
                f"{record['accuracy']:.3f} [{record['ci_low']:.3f}, {record['ci_high']:.3f}]" if record else "-"
            )
        lines.append(f"{name:<{width}}" + "".join(f"  {text:<22}" for text in texts).rstrip())
    return "\n".join(lines)
