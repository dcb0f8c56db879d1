"""What ``nndefense pseudo-label`` does: open, label, choose, compare and print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nndefense.cli import inputs, output
from nndefense.database import ImageDatabase
from nndefense.database.near_images import NearSearch
from nndefense.datasets import ImageDataset, open_dataset
from nndefense.errors import InputError
from nndefense.models import Classifier
from nndefense.statistics import wilson_interval
from nndefense.training.labellers import Combined, Labeller, Retrieval, Teacher
from nndefense.training.pools import balanced_rows, complement
from nndefense.training.pseudo_job import write_pseudo_labels
from nndefense.training.pseudo_labels import PseudoLabels, label_accuracy

_SHOWN = 5


def write(
    specs: Sequence[str],
    source: str,
    out: Path,
    *,
    by: str,
    confidence: str,
    database: Path | None,
    k: int,
    votes: str,
    labelled: str | None,
    labels: int | None,
    exclude: Sequence[str],
    exclude_l2: float | None,
    classes: Path | None,
    input_shape: tuple[int, int, int] | None,
    data_dir: Path | None,
    device: str,
    seed: int,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Label a pool and describe the file."""
    if by != "teacher" and database is None:
        raise InputError(f"labels by {by} need the labelled images: give --database")
    if by == "teacher" and (database is not None or labelled is not None):
        raise InputError("a teacher alone asks no database: leave it out, or choose --by retrieval, product, agreement")
    if labelled is not None and labels is not None:
        raise InputError("--labelled names the labelled images and --labels draws them: give one of the two")
    if exclude_l2 is not None and not exclude:
        raise InputError("--exclude-l2 is a distance to a test set: name it with --exclude")
    classifier = inputs.open_classifier(
        source, device=device, classes=classes, input_shape=input_shape, specs=specs, database=database
    )
    voters, pool = _pool(specs, labels, seed, data_dir=data_dir, like=classifier)
    if labelled is not None:
        voters = inputs.open_datasets([labelled], data_dir=data_dir, like=classifier)
    labeller: Labeller = Teacher(classifier, confidence)
    if database is not None:
        opened = ImageDatabase.open(database, classifier=classifier)
        retrieval = Retrieval(classifier, opened, k, votes, labelled=voters)
        labeller = retrieval if by == "retrieval" else Combined(Teacher(classifier, confidence), retrieval, by)
    search = None
    if exclude:
        tests = inputs.open_datasets(exclude, data_dir=data_dir, like=classifier)
        search = NearSearch(tests, exclude_l2, device=classifier.device)
    _show(out, write_pseudo_labels(labeller, pool, out, exclude=search, **options), as_json)


def select(
    file: Path,
    out: Path,
    *,
    per_class: int | None,
    min_confidence: float,
    short: str,
    seed: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Choose images and write a file of them alone."""
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists: choose another --out, or replace it with --overwrite")
    if file.exists() and out.exists() and file.samefile(out):
        raise InputError(f"{out} is the file that is chosen from: choose another --out")
    chosen = PseudoLabels.open(file).select(per_class, min_confidence=min_confidence, short=short, seed=seed)
    chosen.write(out)
    _show(out, PseudoLabels.open(out), as_json)


def info(file: Path, *, as_json: bool) -> None:
    """Describe a file."""
    _show(file, PseudoLabels.open(file), as_json)


def check(
    file: Path, specs: Sequence[str], labels: int | None, *, data_dir: Path | None, seed: int, as_json: bool
) -> None:
    """Say how many labels are right, with intervals, for all and for the surer half."""
    found = PseudoLabels.open(file)
    channels, height, width = found.job["pool"]["shape"]
    opened = [open_dataset(spec, data_dir=data_dir, size=(height, width), channels=channels) for spec in specs]
    true = inputs.joined(opened)
    if labels is not None:
        rest = np.ones(len(true), dtype=np.bool_)
        rest[balanced_rows(true.labels, labels, seed)] = False
        true = true.subset(rest)
    measured = label_accuracy(found, true)
    lines = []
    for name, row in measured.items():
        low, high = wilson_interval(row["right"], row["n"])
        row["ci_low"], row["ci_high"] = low, high
        lines.append(
            f"{name:<24} {row['right']:>7,} of {row['n']:>7,} right: {100 * row['right'] / row['n']:.2f} % "
            f"({100 * low:.2f} to {100 * high:.2f})"
        )
    output.show({"file": str(file), "accuracy": measured}, "\n".join(lines), as_json)


def _pool(
    specs: Sequence[str], labels: int | None, seed: int, *, data_dir: Path | None, like: Classifier
) -> tuple[ImageDataset | None, ImageDataset]:
    """The labelled images, where they are drawn from the data set, and the pool."""
    images = inputs.open_datasets(specs, data_dir=data_dir, like=like)
    return (None, images) if labels is None else complement(images, labels, seed)


def _show(path: Path, found: PseudoLabels, as_json: bool) -> None:
    near = found.excluded_ids
    labeller, pool = found.job["labeller"], found.job["pool"]
    usable = (found.near_rows < 0) & (found.labels >= 0)
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(found.classes):
        values = found.confidence[usable & (found.labels == number)]
        quartiles = [float(q) for q in np.quantile(values, [0.25, 0.5, 0.75])] if len(values) else None
        rows.append({"class": name, "images": len(values), "confidence_quartiles": quartiles})
    value = {
        "file": str(path),
        "images": len(found),
        "usable": int(usable.sum()),
        "without_label": int((found.labels < 0).sum()),
        "near_test_set": len(near),
        "near_test_set_ids": near,
        "classes": rows,
        "selection": found.selection,
        **found.job,
    }
    teachers = ", ".join(f"{source} ({print_[:12]})" for print_, source in found.teachers.items())
    lines = [
        f"{path}: {len(found):,} of the {pool['n']:,} images of {pool['name']}, {int(usable.sum()):,} usable",
        f"by         {labeller['by']}: {teachers}",
    ]
    if found.job["exclude"] is not None:
        left_out = found.selection["excluded"] if found.selection else len(near)
        shown = ", ".join(near[:_SHOWN]) + (", ..." if len(near) > _SHOWN else "")
        lines.append(
            f"test set   {left_out:,} left out, within L2 {found.job['exclude']['l2']:.4g} of an image of "
            f"{found.job['exclude']['references']['name']}" + (f": {shown}" if near else "")
        )
    if value["without_label"]:
        lines.append(f"no label   {value['without_label']:,}")
    for row in rows:
        quartiles = row["confidence_quartiles"]
        spread = " to ".join(f"{q:.3f}" for q in (quartiles[0], quartiles[2])) if quartiles else "-"
        lines.append(f"{row['class']!s:<24.24} {row['images']:>9,}  confidence {spread} (middle half)")
    lines += _selection_lines(found.selection or {})
    output.show(value, "\n".join(lines), as_json)


def _selection_lines(selection: dict[str, Any]) -> list[str]:
    """What a choice lacks or left to the draw."""
    lines = []
    if selection.get("too_few"):
        named = ", ".join(f"{name} ({count})" for name, count in selection["too_few"].items())
        short = {"keep": "all that they have", "equalize": "and no more of the others"}[selection["short"]]
        lines.append(f"too few    fewer than {selection['per_class'] or 1}: {named}; {short}")
    if selection.get("tied"):
        named = ", ".join(f"{name} ({count})" for name, count in selection["tied"].items())
        lines.append(f"tied       equally sure images were left out, by draw: {named}")
    return lines
