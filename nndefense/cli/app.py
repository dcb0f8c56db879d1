"""The command's subcommands and their options; the work is imported when it is asked for, so that help is instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nndefense.cli import evaluation_app, experiments_app, patches_app, serve_app, training_app
from nndefense.cli.guard_app import guard_app
from nndefense.cli.index_app import index_app
from nndefense.cli.options import (
    KS,
    POOLINGS,
    AttackName,
    AttackOption,
    BatchOption,
    ClassesOption,
    ClassifierOption,
    DatabaseOption,
    DataDirOption,
    DatasetsOption,
    DebugOption,
    Device,
    DeviceOption,
    JsonOption,
    KOption,
    KsOption,
    LayersOption,
    LossOption,
    Norm,
    NormOption,
    OverwriteOption,
    PcaOption,
    PoolingsOption,
    QuietOption,
    RestartsOption,
    RowsOption,
    SeedOption,
    ShapeOption,
    StepsOption,
    WeightingOption,
    number,
    numbers,
    shape,
    words,
)
from nndefense.cli.pseudo_app import pseudo_app
from nndefense.cli.racnn_app import racnn_app
from nndefense.cli.rp2_app import rp2_app
from nndefense.cli.theory_app import theory_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The nearest-neighbour defence against adversarial images: build, calibrate, attack, defend, report.",
    epilog="Exit codes: 0 done, 1 other error, 2 wrong input, 3 data, 4 classifier, 5 database, 130 interrupted.",
)
app.command()(training_app.train)
app.command()(evaluation_app.attack)
app.command()(evaluation_app.evaluate)
app.command()(evaluation_app.demo)
app.command()(experiments_app.reproduce)
app.command()(serve_app.serve)
index_app.command("patches")(patches_app.patches)
index_app.command("patches-info")(patches_app.patches_info)
app.add_typer(index_app, name="index")
app.add_typer(racnn_app, name="racnn")
app.add_typer(guard_app, name="guard")
app.add_typer(pseudo_app, name="pseudo-label")
app.add_typer(rp2_app, name="rp2")
app.add_typer(theory_app, name="theory")


@app.callback()
def _main(debug: DebugOption = False) -> None:
    """--debug is read where errors are caught; here it is only declared."""


@app.command()
def calibrate(
    dataset: DatasetsOption,
    classifier: ClassifierOption,
    out: Annotated[Path, typer.Option("--out", help="Folder for the database with the chosen setting.")],
    calibration: Annotated[
        str | None, typer.Option("--calibration", help="Data set to calibrate on [default: hold images out].")
    ] = None,
    holdout: Annotated[int, typer.Option(min=1, help="Images to hold out of the (first) data set.")] = 300,
    norm: NormOption = Norm.normalized_l2,
    eps: Annotated[str, typer.Option("--eps", help="Budget of the attack to calibrate for.")] = "0.2",
    attack: AttackOption = AttackName.pgd,
    steps: StepsOption = 20,
    restarts: RestartsOption = 1,
    layers: LayersOption = None,
    poolings: PoolingsOption = POOLINGS,
    ks: KsOption = KS,
    pca: PcaOption = 256,
    max_clean_loss: LossOption = 0.02,
    candidate_rows: RowsOption = 20_000,
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
    """Choose layer, pooling, K and weighting on held-out images, and build the database with them."""
    from nndefense.cli import commands
    from nndefense.evaluation import AttackSettings

    commands.calibrate(
        dataset,
        classifier,
        out,
        AttackSettings(attack.value, norm.value, (number("--eps", eps),), steps, restarts),
        calibration=calibration,
        n_holdout=holdout,
        layers=words(layers),
        poolings=words(poolings) or [],
        ks=[int(k) for k in numbers(ks, whole=True)],
        pca=pca,
        max_clean_loss=max_clean_loss,
        candidate_rows=candidate_rows,
        overwrite=overwrite,
        batch_size=batch_size,
        classes=classes,
        input_shape=shape(input_shape),
        data_dir=data_dir,
        device=device.value,
        seed=seed,
        as_json=json,
        progress=not quiet,
    )


@app.command()
def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    database: DatabaseOption,
    classifier: Annotated[
        str | None,
        typer.Option("--classifier", help="As for the other commands [default: the one that the database names]."),
    ] = None,
    k: KOption = None,
    weighting: WeightingOption = None,
    top: Annotated[int, typer.Option(min=1, help="Classes and neighbours to show.")] = 5,
    convert: Annotated[bool, typer.Option("--convert", help="Turn grey images to colour, or colour to grey.")] = False,
    reject_rate: Annotated[
        float | None, typer.Option(help="Mark images farther away than all but this share of clean ones.")
    ] = None,
    batch_size: BatchOption = 64,
    classes: ClassesOption = None,
    input_shape: ShapeOption = None,
    device: DeviceOption = Device.auto,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Classify image files from their nearest neighbours, beside what the bare classifier says."""
    from nndefense.cli import commands

    commands.classify(
        images,
        classifier,
        database,
        k=k,
        weighting=weighting.value if weighting else None,
        top=top,
        convert=convert,
        reject_rate=reject_rate,
        batch_size=batch_size,
        classes=classes,
        input_shape=shape(input_shape),
        device=device.value,
        as_json=json,
    )
