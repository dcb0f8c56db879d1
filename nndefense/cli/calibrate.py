"""``nndefense calibrate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nndefense.cli.declare import Commas, OneOf
from nndefense.cli.options import (
    AttackOptions,
    BatchOption,
    ClassifierOptions,
    Common,
    DatasetsOption,
    OverwriteOption,
    PcaOption,
    number,
    numbers,
    words,
)

if TYPE_CHECKING:
    from nndefense.pipeline import Candidates


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What a setting is chosen from, and on which images."""

    calibration: Annotated[str | None, typer.Option(help="Data set to calibrate on [default: hold images out].")] = None
    holdout: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images to hold out of the (first) data set [default: 300, or a third where that is less]."
        ),
    ] = None
    layers: Annotated[str | None, Commas("Layers to try, with commas [default: six, spread over the net].")] = None
    poolings: Annotated[str, Commas("Poolings to try, with commas: avg, max, rmac, gridG, flatten, cls.")] = (
        "avg,rmac,grid4,grid8,cls"
    )
    ks: Annotated[str, Commas("Numbers of neighbours to try, with commas.")] = "1,3,5,10,20,50"
    votes: Annotated[str, Commas("What may vote, with commas: posteriors, labels.")] = "posteriors"
    temperatures: Annotated[
        str,
        Commas("Kernels exp(-d^2/T) to try: T as multiples of the median squared distance to the K-th row, or none."),
    ] = "none"
    alphas: Annotated[str, Commas("Shares of the classifier's own posterior to try, from 0 to 1.")] = "0"
    pca: PcaOption = 256
    max_clean_loss: Annotated[
        float, typer.Option(min=0, max=1, help="Clean accuracy that may be lost, as a fraction.")
    ] = 0.02
    objective: Annotated[
        str,
        OneOf(
            "What counts: the worst of the attack and one that knows the retrieval, or the attack alone.",
            ("informed", "gray"),
        ),
    ] = "informed"
    candidate_rows: Annotated[
        int, typer.Option(min=1, help="Database images, drawn at random, to compare settings on.")
    ] = 20_000

    @property
    def candidates(self) -> Candidates:
        """The settings to compare."""
        from nndefense.pipeline import Candidates

        return Candidates(
            layers=words(self.layers),
            poolings=words(self.poolings) or [],
            ks=[int(k) for k in numbers("--ks", self.ks, whole=True)],
            votes=words(self.votes) or [],
            temperatures=[
                None if word == "none" else number("--temperatures", word) for word in words(self.temperatures) or []
            ],
            alphas=numbers("--alphas", self.alphas),
            pca=self.pca,
            max_clean_loss=self.max_clean_loss,
            rows=self.candidate_rows,
            objective=self.objective,
        )


def calibrate(
    *,
    dataset: DatasetsOption,
    model: ClassifierOptions,
    out: Annotated[Path, typer.Option(help="Folder for the database with the chosen setting.")],
    by: AttackOptions,
    eps: Annotated[str, typer.Option(help="Budget of the attack to calibrate for.")] = "0.2",
    choice: CalibrationOptions,
    build_anyway: Annotated[
        bool, typer.Option("--build-anyway", help="Build the best setting also where it is no better than none.")
    ] = False,
    overwrite: OverwriteOption = False,
    batch_size: BatchOption = 128,
    common: Common,
) -> None:
    """Choose layer, pooling and rule on held-out images, and build the database with them.

    Where no setting is better than the classifier alone, it says so, builds nothing and ends with exit code 1.
    """
    from nndefense.evaluation import calibration_text
    from nndefense.pipeline import NothingBetterError, build_calibrated, split

    settings, candidates = by.settings((number("--eps", eps),)), choice.candidates
    net = model.open(common, specs=dataset)
    sets = split(
        dataset,
        choice.calibration,
        choice.holdout,
        data_dir=common.data_dir,
        like=net,
        seed=common.seed,
        say=common.say,
    )
    try:
        database, chosen = build_calibrated(
            net,
            sets,
            out,
            settings,
            candidates,
            build_anyway=build_anyway,
            specs=dataset,
            overwrite=overwrite,
            batch_size=batch_size,
            seed=common.seed,
            progress=common.progress,
            say=common.say,
        )
    except NothingBetterError as error:
        found = error.chosen.calibration
        common.show({"database": None, "rows": 0, "calibration": found}, calibration_text(found))
        raise
    common.show(
        {"database": str(out), "rows": len(database), "calibration": chosen.calibration},
        f"{calibration_text(chosen.calibration)}\nbuilt {out}: {len(database):,} rows of {chosen.feature}",
    )
