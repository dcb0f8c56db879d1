"""The subcommands calibrate and classify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nndefense.cli.declare import Only
from nndefense.cli.options import (
    KS,
    POOLINGS,
    AttackOption,
    BatchOption,
    ClassifierOptions,
    Common,
    DatabaseOptions,
    DatasetsOption,
    KOption,
    KsOption,
    LayersOption,
    LossOption,
    NormOption,
    OverwriteOption,
    PcaOption,
    PoolingsOption,
    QueriesOption,
    RestartsOption,
    RowsOption,
    StepsOption,
    WeightingOption,
    number,
    numbers,
    words,
)


def calibrate(
    *,
    dataset: DatasetsOption,
    model: ClassifierOptions,
    out: Annotated[Path, typer.Option("--out", help="Folder for the database with the chosen setting.")],
    calibration: Annotated[
        str | None, typer.Option("--calibration", help="Data set to calibrate on [default: hold images out].")
    ] = None,
    holdout: Annotated[int, typer.Option(min=1, help="Images to hold out of the (first) data set.")] = 300,
    norm: NormOption = "normalized-l2",
    eps: Annotated[str, typer.Option("--eps", help="Budget of the attack to calibrate for.")] = "0.2",
    attack: AttackOption = "pgd",
    steps: StepsOption = None,
    queries: QueriesOption = None,
    restarts: RestartsOption = 1,
    layers: LayersOption = None,
    poolings: PoolingsOption = POOLINGS,
    ks: KsOption = KS,
    pca: PcaOption = 256,
    max_clean_loss: LossOption = 0.02,
    candidate_rows: RowsOption = 20_000,
    overwrite: OverwriteOption = False,
    batch_size: BatchOption = 128,
    common: Common,
) -> None:
    """Choose layer, pooling, K and weighting on held-out images, and build the database with them."""
    from nndefense.cli import commands
    from nndefense.evaluation import AttackSettings
    from nndefense.pipeline import Candidates

    commands.calibrate(
        dataset,
        model.classifier,
        out,
        AttackSettings(attack, norm, (number("--eps", eps),), steps, restarts, queries=queries),
        calibration=calibration,
        n_holdout=holdout,
        candidates=Candidates(
            layers=words(layers),
            poolings=words(poolings) or [],
            ks=[int(k) for k in numbers(ks, whole=True)],
            pca=pca,
            max_clean_loss=max_clean_loss,
            rows=candidate_rows,
        ),
        overwrite=overwrite,
        batch_size=batch_size,
        classes=model.classes,
        input_shape=model.shape,
        data_dir=common.data_dir,
        device=common.device,
        seed=common.seed,
        as_json=common.json,
        progress=common.progress,
    )


def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    *,
    data: DatabaseOptions,
    k: KOption = None,
    weighting: WeightingOption = None,
    top: Annotated[int, typer.Option(min=1, help="Classes and neighbours to show.")] = 5,
    convert: Annotated[bool, typer.Option("--convert", help="Turn grey images to colour, or colour to grey.")] = False,
    reject_rate: Annotated[
        float | None, typer.Option(help="Mark images farther away than all but this share of clean ones.")
    ] = None,
    batch_size: BatchOption = 64,
    common: Annotated[Common, Only("device", "json", "debug")],
) -> None:
    """Classify image files from their nearest neighbours, beside what the bare classifier says."""
    from nndefense.cli import commands

    commands.classify(
        images,
        data.classifier,
        data.database,
        k=k,
        weighting=weighting,
        top=top,
        convert=convert,
        reject_rate=reject_rate,
        batch_size=batch_size,
        classes=data.classes,
        input_shape=data.shape,
        device=common.device,
        as_json=common.json,
    )
