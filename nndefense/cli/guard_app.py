"""Options of ``nndefense guard``; the work is imported when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nndefense.cli.options import (
    BatchOption,
    ClassesOption,
    DatabaseOption,
    DataDirOption,
    DatasetsOption,
    DebugOption,
    Device,
    DeviceOption,
    JsonOption,
    LimitOption,
    OverwriteOption,
    SeedOption,
    ShapeOption,
    shape,
)

guard_app = typer.Typer(
    no_args_is_help=True, help="Calibrate the guard: how far is too far from the database's images."
)


@guard_app.command()
def calibrate(
    database: DatabaseOption,
    dataset: DatasetsOption,
    classifier: Annotated[
        str | None,
        typer.Option("--classifier", help="As for the other commands [default: the one that the database names]."),
    ] = None,
    reject_rate: Annotated[
        float | None, typer.Option(help="Store a rate of clean images to abstain on [default: do not abstain].")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The file [default: guard.json of the database].")] = None,
    overwrite: OverwriteOption = False,
    limit: LimitOption = None,
    batch_size: BatchOption = 64,
    classes: ClassesOption = None,
    input_shape: ShapeOption = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure how far clean images lie from the database: those of --dataset, which must not stand in it."""
    from nndefense.cli import guard

    guard.calibrate(
        database,
        dataset,
        classifier,
        reject_rate=reject_rate,
        out=out,
        overwrite=overwrite,
        limit=limit,
        batch_size=batch_size,
        classes=classes,
        input_shape=shape(input_shape),
        data_dir=data_dir,
        device=device.value,
        seed=seed,
        as_json=json,
    )
