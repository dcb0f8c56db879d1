"""Options of ``nndefense pseudo-label``; the work is imported when it is asked for."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from nndefense.cli.options import (
    BatchOption,
    ClassesOption,
    ClassifierOption,
    DataDirOption,
    DatasetsOption,
    DebugOption,
    Device,
    DeviceOption,
    JsonOption,
    OverwriteOption,
    QuietOption,
    SeedOption,
    ShapeOption,
    number,
    shape,
)

pseudo_app = typer.Typer(
    no_args_is_help=True,
    help="Labels for unlabelled images, by a teacher, by the nearest labelled images, or by both.",
)


class By(str, Enum):
    """Who labels."""

    teacher = "teacher"
    retrieval = "retrieval"
    product = "product"
    agreement = "agreement"


class Confidence(str, Enum):
    """How sure a teacher is."""

    probability = "probability"
    margin = "margin"


class Votes(str, Enum):
    """What a neighbour's vote weighs."""

    distance = "distance"
    uniform = "uniform"
    cbw_e = "cbw-e"
    cbw_d = "cbw-d"


class Short(str, Enum):
    """What becomes of classes with too few images."""

    keep = "keep"
    equalize = "equalize"


FileArgument = Annotated[Path, typer.Argument(help="File of pseudo-labels.")]
LabelsOption = Annotated[
    int | None,
    typer.Option(
        "--labels",
        min=1,
        help="Take that many images, drawn class by class with --seed, for the labelled ones; the pool is the rest.",
    ),
]


@pseudo_app.command()
def write(
    dataset: DatasetsOption,
    classifier: ClassifierOption,
    out: Annotated[Path, typer.Option("--out", help="HDF5 file for the pseudo-labels.")],
    by: Annotated[By, typer.Option(help="Who labels.")] = By.teacher,
    confidence: Annotated[Confidence, typer.Option(help="Of the teacher: softmax, or lead over the second.")] = (
        Confidence.probability
    ),
    database: Annotated[Path | None, typer.Option("--database", help="Database of labelled images.")] = None,
    k: Annotated[int, typer.Option(min=1, help="Neighbours that vote.")] = 10,
    votes: Annotated[Votes, typer.Option(help="What a vote weighs.")] = Votes.distance,
    labelled: Annotated[
        str | None, typer.Option("--labelled", help="Data set: of the database, only its images vote.")
    ] = None,
    labels: LabelsOption = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Test set to keep the pool apart from. Repeat it for several.")
    ] = None,
    exclude_l2: Annotated[
        str | None,
        typer.Option(
            "--exclude-l2", help="L2 distance in pixels of [0, 1] [default: 2000/255 * sqrt(dimensions / 3072)]."
        ),
    ] = None,
    part_images: Annotated[int, typer.Option(min=1, help="Images after which the work is kept.")] = 4096,
    overwrite: OverwriteOption = False,
    batch_size: BatchOption = 128,
    classes: ClassesOption = None,
    input_shape: ShapeOption = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Label a pool; killed and started again, it goes on where it stood."""
    from nndefense.cli import pseudo

    pseudo.write(
        dataset,
        classifier,
        out,
        by=by.value,
        confidence=confidence.value,
        database=database,
        k=k,
        votes=votes.value,
        labelled=labelled,
        labels=labels,
        exclude=exclude or [],
        exclude_l2=None if exclude_l2 is None else number("--exclude-l2", exclude_l2),
        classes=classes,
        input_shape=shape(input_shape),
        data_dir=data_dir,
        device=device.value,
        seed=seed,
        as_json=json,
        options={
            "part_images": part_images,
            "overwrite": overwrite,
            "batch_size": batch_size,
            "progress": not quiet,
        },
    )


@pseudo_app.command()
def select(
    file: FileArgument,
    out: Annotated[Path, typer.Option("--out", help="File for the chosen ones.")],
    per_class: Annotated[int | None, typer.Option(min=1, help="So many of each class [default: all].")] = None,
    min_confidence: Annotated[float, typer.Option(min=0, max=1, help="Only images of at least this confidence.")] = 0.0,
    short: Annotated[
        Short, typer.Option(help="Where classes have too few: keep these, or take as few of all.")
    ] = Short.keep,
    overwrite: OverwriteOption = False,
    seed: SeedOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Choose the most confident images of each class."""
    from nndefense.cli import pseudo

    pseudo.select(
        file,
        out,
        per_class=per_class,
        min_confidence=min_confidence,
        short=short.value,
        seed=seed,
        overwrite=overwrite,
        as_json=json,
    )


@pseudo_app.command()
def info(file: FileArgument, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Describe a file: counts and confidence by class, what was left out, and by whom it was labelled."""
    from nndefense.cli import pseudo

    pseudo.info(file, as_json=json)


@pseudo_app.command()
def check(
    file: FileArgument,
    dataset: DatasetsOption,
    labels: LabelsOption = None,
    data_dir: DataDirOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare the labels with the true ones, where the pool has them; for experiments only."""
    from nndefense.cli import pseudo

    pseudo.check(file, dataset, labels, data_dir=data_dir, seed=seed, as_json=json)
