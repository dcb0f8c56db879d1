"""``nndefense demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nndefense.cli.calibrate import CalibrationOptions
from nndefense.cli.evaluate import RungOptions, show_results
from nndefense.cli.options import (
    SPEC_HELP,
    BatchOption,
    Common,
    LimitOption,
    OwnOptions,
    SizeOption,
    command_line,
    number,
)
from nndefense.cli.options import size as sides

# What stands at a small budget meets every round of the adaptive attack: fewer budgets than elsewhere.
_SHORT = RungOptions(eps="0.1,0.2,0.3", exact=True)
# The demo attacks adaptively what it chose, not all that it chooses from: that takes minutes more.
_GRAY = CalibrationOptions(objective="gray")


def demo(
    *,
    dataset: Annotated[
        list[str] | None, typer.Option(help=SPEC_HELP + " It fills the database [default: digits].")
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Data set to report on [default: the first one's split test].")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything that is made.")] = Path("runs/demo"),
    classifier: Annotated[str | None, typer.Option(help="A ready classifier [default: train one].")] = None,
    arch: Annotated[str, typer.Option(help="Architecture of the classifier that is trained.")] = "small-cnn",
    surrogate_arch: Annotated[str, typer.Option(help="Architecture of the surrogate.")] = "madry-mnist",
    size: SizeOption = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Training epochs [default: by the data's size].")] = None,
    rungs: RungOptions = _SHORT,
    headline: Annotated[str, typer.Option(help="The budget to calibrate for and to tabulate.")] = "0.2",
    choice: CalibrationOptions = _GRAY,
    limit: LimitOption = 2000,
    batch_size: BatchOption = 128,
    own: OwnOptions,
    common: Common,
) -> None:
    """Do it all: train, calibrate, build the database, attack, defend, and report."""
    from nndefense.pipeline import DemoSettings, reported_split, run_demo

    sets = dataset or ["digits"]
    settings = DemoSettings(
        database_sets=sets,
        test=test or reported_split(sets[0], data_dir=common.data_dir),
        out=out,
        attack=rungs.settings(rungs.budgets),
        adaptive=rungs.adaptive_settings if rungs.adaptive else None,
        exact=rungs.exact,
        headline_eps=number("--headline", headline),
        audit=rungs.audit,
        calibration=choice.calibration,
        holdout=choice.holdout,
        classifier=classifier,
        surrogate=rungs.surrogate,
        arch=arch,
        surrogate_arch=surrogate_arch,
        classes=own.classes,
        input_shape=own.shape,
        size=sides(size),
        candidates=choice.candidates,
        epochs=epochs,
        limit=limit,
        batch_size=batch_size,
        gallery=rungs.gallery,
        data_dir=common.data_dir,
        device=common.device,
        seed=common.seed,
        command=command_line(),
        progress=common.progress,
    )
    results = run_demo(settings, common.say)
    show_results(out, results, common)
