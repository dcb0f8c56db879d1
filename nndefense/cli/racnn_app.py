"""Options of ``nndefense racnn``; the work is imported when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nndefense.cli.options import (
    SPEC_HELP,
    BatchOption,
    ClassesOption,
    ClassifierOption,
    DatabaseOption,
    DataDirOption,
    DatasetOption,
    DebugOption,
    Device,
    DeviceOption,
    JsonOption,
    Norm,
    NormOption,
    OverwriteOption,
    QuietOption,
    SeedOption,
    StepsOption,
    numbers,
)

racnn_app = typer.Typer(
    no_args_is_help=True,
    help="RA-CNN: classify an image's projection into the hull of its retrieved neighbours (Zhao and Cho 2019).",
)


@racnn_app.command()
def train(
    dataset: DatasetOption,
    classifier: ClassifierOption,
    database: DatabaseOption,
    out: Annotated[Path, typer.Option("--out", help="Folder for the trained net and its features of all rows.")],
    arch: Annotated[str, typer.Option("--arch", help="Architecture of the trained features.")] = "small-cnn",
    k: Annotated[int, typer.Option("--k", min=1, help="Neighbours; 5 or 10 in the paper.")] = 5,
    mixup_draws: Annotated[int, typer.Option(min=1, help="Draws of local mixup a step and image.")] = 5,
    mixup_weight: Annotated[
        float, typer.Option(help="Weight of local mixup against the cross-entropy; unknown in the paper; 0: none.")
    ] = 1.0,
    images: Annotated[
        str | None,
        typer.Option("--images", help="Images of the database's rows [default: as recorded there]. " + SPEC_HELP),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data [default: by its size].")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per step [default: by its size].")] = None,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.0,
    optimizer: Annotated[str, typer.Option(help="adam, adamw or sgd.")] = "adam",
    schedule: Annotated[str, typer.Option(help="cosine, step, one-cycle or none.")] = "cosine",
    augment: Annotated[bool, typer.Option("--augment", help="Shift images at random.")] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror images at random.")] = False,
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    checkpoint_seconds: Annotated[float, typer.Option(help="Save also after so many seconds; 0: only by epoch.")] = 300,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Curves in OUT/net/tensorboard.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished training in --out.")] = False,
    overwrite: OverwriteOption = False,
    classes: ClassesOption = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train features, attention and classifier on the neighbours that a database retrieves."""
    from nndefense.cli import racnn

    racnn.train(
        dataset,
        classifier,
        database,
        out,
        images=images,
        classes=classes,
        data_dir=data_dir,
        as_json=json,
        options={
            "arch": arch,
            "k": k,
            "mixup_draws": mixup_draws,
            "mixup_weight": mixup_weight,
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "weight_decay": weight_decay,
            "optimizer": optimizer,
            "schedule": schedule,
            "augment": augment,
            "flip": flip,
            "precision": precision,
            "checkpoint_seconds": checkpoint_seconds or None,
            "tensorboard": tensorboard,
            "resume": resume,
            "overwrite": overwrite,
            "device": device.value,
            "seed": seed,
            "progress": not quiet,
        },
    )


@racnn_app.command()
def evaluate(
    model: Annotated[Path, typer.Option("--model", help="Folder of a trained RA-CNN.")],
    dataset: DatasetOption,
    classifier: ClassifierOption,
    database: DatabaseOption,
    k: Annotated[int | None, typer.Option("--k", min=1, help="Neighbours [default: as in training].")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Images for the clean accuracy, drawn at random.")] = None,
    attacked: Annotated[int, typer.Option(min=1, help="How many of them are attacked at most.")] = 500,
    eps: Annotated[str, typer.Option("--eps", help="Budgets, with commas, in units of the norm; 8/255 is fine.")] = (
        "0.1"
    ),
    norm: NormOption = Norm.linf,
    steps: StepsOption = 40,
    adaptive: Annotated[
        bool, typer.Option("--adaptive/--no-adaptive", help="Also the ensemble of attacks on the retrieval.")
    ] = True,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the figures to this JSON file.")] = None,
    batch_size: BatchOption = 100,
    classes: ClassesOption = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Clean accuracy, and accuracy under attacks that ignore, hold, follow or relax the retrieval, with intervals."""
    from nndefense.cli import racnn

    racnn.evaluate(
        model,
        dataset,
        classifier,
        database,
        k=k,
        limit=limit,
        attacked=attacked,
        budgets=numbers(eps),
        norm=norm.value,
        steps=steps,
        adaptive=adaptive,
        out=out,
        batch_size=batch_size,
        classes=classes,
        data_dir=data_dir,
        device=device.value,
        seed=seed,
        as_json=json,
        progress=not quiet,
    )
