"""``nndefense pseudo-label``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nndefense.cli.declare import Group, OneOf, Only
from nndefense.cli.options import (
    BatchOption,
    ClassifierOptions,
    Common,
    DatasetsOption,
    OverwriteOption,
    Printing,
    number,
)
from nndefense.errors import InputError

if TYPE_CHECKING:
    from nndefense.training.labellers import Labeller
    from nndefense.training.pseudo_labels import PseudoLabels

_SHOWN = 5

pseudo_label = Group(
    "pseudo-label", "Labels for unlabelled images, by a teacher, by the nearest labelled images, or by both."
)

FileArgument = Annotated[Path, typer.Argument(help="File of pseudo-labels.")]
LabelsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Take that many images, drawn class by class with --seed, for the labelled ones; the pool is the rest.",
    ),
]


@pseudo_label.command("write")
def write(
    *,
    dataset: DatasetsOption,
    model: ClassifierOptions,
    out: Annotated[Path, typer.Option(help="HDF5 file for the pseudo-labels.")],
    by: Annotated[str, OneOf("Who labels.", ("teacher", "retrieval", "product", "agreement"))] = "teacher",
    confidence: Annotated[
        str, OneOf("Of the teacher: softmax, or lead over the second.", ("probability", "margin"))
    ] = "probability",
    database: Annotated[Path | None, typer.Option(help="Database of labelled images.")] = None,
    k: Annotated[int, typer.Option(min=1, help="Neighbours that vote.")] = 10,
    votes: Annotated[str, OneOf("What a vote weighs.", ("distance", "uniform", "cbw-e", "cbw-d"))] = "distance",
    labelled: Annotated[str | None, typer.Option(help="Data set: of the database, only its images vote.")] = None,
    labels: LabelsOption = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Test set to keep the pool apart from. Repeat it for several.")
    ] = None,
    exclude_l2: Annotated[
        str | None,
        typer.Option(help="L2 distance in pixels of [0, 1] [default: 2000/255 * sqrt(dimensions / 3072)]."),
    ] = None,
    part_images: Annotated[int, typer.Option(min=1, help="Images after which the work is kept.")] = 4096,
    overwrite: OverwriteOption = False,
    batch_size: BatchOption = 128,
    common: Common,
) -> None:
    """Label a pool; killed and started again, it goes on where it stood."""
    from nndefense.database import ImageDatabase
    from nndefense.database.near_images import NearSearch
    from nndefense.pipeline import open_datasets
    from nndefense.training.labellers import Combined, Retrieval, Teacher
    from nndefense.training.pools import complement
    from nndefense.training.pseudo_job import write_pseudo_labels

    far = None if exclude_l2 is None else number("--exclude-l2", exclude_l2)
    if by != "teacher" and database is None:
        raise InputError(f"labels by {by} need the labelled images: give --database")
    if by == "teacher" and (database is not None or labelled is not None):
        raise InputError("a teacher alone asks no database: leave it out, or choose --by retrieval, product, agreement")
    if labelled is not None and labels is not None:
        raise InputError("--labelled names the labelled images and --labels draws them: give one of the two")
    if exclude_l2 is not None and not exclude:
        raise InputError("--exclude-l2 is a distance to a test set: name it with --exclude")
    net = model.open(common, specs=dataset, database=database)
    pool, voters = open_datasets(dataset, data_dir=common.data_dir, like=net), None
    if labels is not None:
        voters, pool = complement(pool, labels, common.seed)
    if labelled is not None:
        voters = open_datasets([labelled], data_dir=common.data_dir, like=net)
    labeller: Labeller = Teacher(net, confidence)
    if database is not None:
        retrieval = Retrieval(net, ImageDatabase.open(database, classifier=net), k, votes, labelled=voters)
        labeller = retrieval if by == "retrieval" else Combined(Teacher(net, confidence), retrieval, by)
    search = None
    if exclude:
        search = NearSearch(open_datasets(exclude, data_dir=common.data_dir, like=net), far, device=net.device)
    found = write_pseudo_labels(
        labeller,
        pool,
        out,
        exclude=search,
        batch_size=batch_size,
        part_images=part_images,
        overwrite=overwrite,
        progress=common.progress,
    )
    _show(out, found, common)


@pseudo_label.command("select")
def select(
    file: FileArgument,
    *,
    out: Annotated[Path, typer.Option(help="File for the chosen ones.")],
    per_class: Annotated[int | None, typer.Option(min=1, help="So many of each class [default: all].")] = None,
    min_confidence: Annotated[float, typer.Option(min=0, max=1, help="Only images of at least this confidence.")] = 0.0,
    short: Annotated[
        str,
        OneOf("Where classes have too few: keep these, or take as few of all.", ("keep", "equalize")),
    ] = "keep",
    overwrite: OverwriteOption = False,
    common: Annotated[Common, Only("seed", "json", "quiet", "debug")],
) -> None:
    """Choose the most confident images of each class."""
    from nndefense.training.pseudo_labels import PseudoLabels

    if out.exists() and not overwrite:
        raise InputError(f"{out} exists: choose another --out, or replace it with --overwrite")
    if file.exists() and out.exists() and file.samefile(out):
        raise InputError(f"{out} is the file that is chosen from: choose another --out")
    chosen = PseudoLabels.open(file).select(per_class, min_confidence=min_confidence, short=short, seed=common.seed)
    chosen.write(out)
    _show(out, PseudoLabels.open(out), common)


@pseudo_label.command("info")
def info(file: FileArgument, *, common: Printing) -> None:
    """Describe a file: counts and confidence by class, what was left out, and by whom it was labelled."""
    from nndefense.training.pseudo_labels import PseudoLabels

    _show(file, PseudoLabels.open(file), common)


@pseudo_label.command("check")
def check(
    file: FileArgument,
    *,
    dataset: DatasetsOption,
    labels: LabelsOption = None,
    common: Annotated[Common, Only("data_dir", "seed", "json", "quiet", "debug")],
) -> None:
    """Compare the labels with the true ones, where the pool has them; for experiments only."""
    import numpy as np

    from nndefense.pipeline import open_datasets
    from nndefense.statistics import wilson_interval
    from nndefense.training.pools import balanced_rows
    from nndefense.training.pseudo_labels import PseudoLabels, label_accuracy

    found = PseudoLabels.open(file)
    channels, height, width = found.job["pool"]["shape"]
    true = open_datasets(dataset, data_dir=common.data_dir, like=(channels, height, width))
    if labels is not None:
        true = true.subset(np.setdiff1d(np.arange(len(true)), balanced_rows(true.labels, labels, common.seed)))
    measured = label_accuracy(found, true)
    lines = []
    for name, row in measured.items():
        low, high = wilson_interval(row["right"], row["n"])
        row["ci_low"], row["ci_high"] = low, high
        lines.append(
            f"{name:<24} {row['right']:>7,} of {row['n']:>7,} right: {100 * row['right'] / row['n']:.2f} % "
            f"({100 * low:.2f} to {100 * high:.2f})"
        )
    common.show({"file": str(file), "accuracy": measured}, "\n".join(lines))


def _show(path: Path, found: PseudoLabels, common: Common) -> None:
    import numpy as np

    near = found.excluded_ids
    labeller, pool = found.job["labeller"], found.job["pool"]
    usable = (found.near_rows < 0) & (found.labels >= 0)
    rows: list[dict[str, Any]] = []
    for place, name in enumerate(found.classes):
        values = found.confidence[usable & (found.labels == place)]
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
    common.show(value, "\n".join(lines))


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
