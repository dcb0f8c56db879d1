"""What the subcommands of ``index`` do, each as one function of plain values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from index_build import build_database, stages
from nndefense.cli import inputs, output
from nndefense.database import ImageDatabase, Manifest
from nndefense.errors import InputError
from nndefense.features import FeatureSpec

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def build(
    specs: Sequence[str],
    source: str,
    feature: FeatureSpec,
    out: Path,
    *,
    rows_only: bool,
    classes: Path | None,
    input_shape: tuple[int, int, int] | None,
    data_dir: Path | None,
    device: str,
    limit: int | None,
    exclude: str | None,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Build a database and describe it; or, with ``rows_only``, extract its rows and leave it unfinished."""
    classifier = inputs.open_classifier(
        source, device=device, data_dir=data_dir, classes=classes, input_shape=input_shape, specs=specs
    )
    images = inputs.open_datasets(specs, data_dir=data_dir, like=classifier, limit=limit, seed=options["seed"])
    kept_out = inputs.open_datasets([exclude], data_dir=data_dir, like=classifier) if exclude else None
    reopen = {
        "classifier": source,
        "classes": str(classes) if classes else None,
        "input_shape": list(input_shape) if input_shape else None,
        "data_dir": str(data_dir) if data_dir else None,
        "limit": limit,
        "exclude": exclude,
    }
    settings = {**options, "specs": specs, "exclude": kept_out, "reopen": reopen}
    if not rows_only:
        output.describe(build_database(images, classifier, feature, out, **settings), as_json)
        return
    settings.pop("index_device")
    found = stages.extract(images, classifier, feature, out, **settings)
    output.show(
        {"database": str(out), "rows": found.rows, "rejected": found.rejected},
        f"{out}: {found.rows:,} rows extracted{rejections(found.rejected)}; next: nndefense index fit {out}",
        as_json,
    )


def fit(folder: Path, *, index: str | None, memory: int | None, device: str, as_json: bool) -> None:
    """Fit the index of an unfinished build on its rows, as it was asked for or as another kind."""
    found = stages.fit(folder, index=index, memory=memory, device=device)
    why = f" ({found.why})" if found.why else ""
    output.show(
        {"database": str(folder), "factory": found.factory, "why": found.why, "mergeable": found.mergeable},
        f"{folder}: index {found.factory}{why} fitted; next: nndefense index add {folder}",
        as_json,
    )


def add(folder: Path, *, as_json: bool, **options: Any) -> None:
    """Make the parts of the index; options as for :func:`index_build.stages.add`."""
    parts = stages.add(folder, **options)
    what = f"{parts} parts of the index made" if parts else "an index of this kind has no parts: merge adds all rows"
    output.show(
        {"database": str(folder), "parts": parts}, f"{folder}: {what}; next: nndefense index merge {folder}", as_json
    )


def merge(folder: Path, *, as_json: bool) -> None:
    """Make one index of the parts, and the manifest."""
    manifest = stages.merge(folder)
    output.show(
        {"database": str(folder), "rows": manifest.rows, "files": len(manifest.files)},
        f"{folder}: {manifest.rows:,} rows in one index; next: nndefense index verify {folder}",
        as_json,
    )


def info(folder: Path, *, as_json: bool) -> None:
    """Describe a database without reading its rows."""
    output.describe(ImageDatabase.open(folder, verify=False), as_json)


def verify(
    folder: Path,
    *,
    recall: float | None,
    k: int | None,
    queries: str | None,
    limit: int,
    data_dir: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Check a database and say that it is whole; measure its index where that is asked for."""
    settings: dict[str, Any] = {"recall": recall, "k": k}
    if queries is not None:
        settings |= {"queries": _vectors(folder, queries, limit, data_dir, device), "queries_from": queries}
    found = stages.verify(folder, **settings)
    text = f"{folder} is whole: {found['rows']:,} rows, {found['files']} files with the right sha256, no id twice"
    if "search" in found:
        text += f"\n{output.search_text(found['search'])}"
    output.show({"database": str(folder), "ok": True, **found}, text, as_json)


def _vectors(folder: Path, queries: str, limit: int, data_dir: Path | None, device: str) -> Any:
    """The feature vectors of images to look for, made with the classifier that the database names."""
    source = Manifest.read(folder).classifier["source"]
    classifier = inputs.open_classifier(source, device=device, data_dir=data_dir, database=folder)
    database = ImageDatabase.open(folder, classifier=classifier, verify=False)
    images = inputs.open_datasets([queries], data_dir=data_dir, like=classifier, limit=limit)
    return stages.vectors_of(database, classifier, images)


def size(option: str, text: str | None) -> int | None:
    """Read ``500M`` or ``15GB`` as bytes.

    Raises:
        InputError: the text is no size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", text.strip().upper())
    if match is None:
        raise InputError(f"{option} is {text!r}, but must be a size such as 500M or 15G")
    return int(float(match[1]) * _UNITS[match[2]])


def rejections(counts: dict[str, int]) -> str:
    """How many images were left out and why, to follow the number of rows; empty where none was."""
    if not counts:
        return ""
    told = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    return f", {sum(counts.values()):,} images left out ({told}; see rejected.jsonl)"
