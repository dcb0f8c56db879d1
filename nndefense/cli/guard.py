"""``nndefense guard``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nndefense.cli.declare import Group, Only
from nndefense.cli.options import BatchOption, Common, DatabaseOptions, DatasetsOption, LimitOption, OverwriteOption
from nndefense.errors import InputError

# False-rejection rates whose thresholds are printed.
_RATES = (0.01, 0.05, 0.1)

guard = Group("guard", "Calibrate the guard: how far is too far from the database's images.")


@guard.command("calibrate")
def calibrate(
    *,
    data: DatabaseOptions,
    dataset: DatasetsOption,
    reject_rate: Annotated[
        float | None, typer.Option(help="Store a rate of clean images to abstain on [default: do not abstain].")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file [default: guard.json of the database].")] = None,
    overwrite: OverwriteOption = False,
    limit: LimitOption = None,
    batch_size: BatchOption = 64,
    common: Annotated[Common, Only("data_dir", "device", "seed", "json", "quiet", "debug")],
) -> None:
    """Measure how far clean images lie from the database: those of --dataset, which must not stand in it."""
    from nndefense.datasets.spec import VALIDATION, measured_spec
    from nndefense.guard import Guard
    from nndefense.guard.percentile import FILE, check_rate
    from nndefense.locks import locked, locked_file
    from nndefense.pipeline import open_datasets

    if reject_rate is not None:
        check_rate(reject_rate)
    path = data.database / FILE if out is None else out
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: choose another file, or --overwrite")
    opened = Guard.open(**data.guard(common), calibration=False)
    dataset = [measured_spec(spec, data_dir=common.data_dir, among=(*VALIDATION, "test")) for spec in dataset]
    images = open_datasets(dataset, data_dir=common.data_dir, like=opened.classifier, limit=limit, seed=common.seed)
    # A database is not built anew while its guard is calibrated.
    with locked_file(path) if out is not None else locked(data.database):
        found = opened.calibrate(images, specs=dataset, reject_rate=reject_rate, batch_size=batch_size)
        found.write(path)
    rates = [rate for rate in (*_RATES, *([reject_rate] if reject_rate else [])) if rate >= 1 / (len(found) + 1)]
    thresholds = {rate: found.threshold(rate) for rate in sorted(set(rates))}
    lines = [f"{path}: {len(found):,} images of {images.name}, median distance {found.distances[len(found) // 2]:.4g}"]
    lines += [f"  abstaining on {rate:.1%} of clean images: beyond {far:.4g}" for rate, far in thresholds.items()]
    common.show(
        {
            "file": str(path),
            "n": len(found),
            "dataset": found.dataset["name"],
            "reject_rate": reject_rate,
            "thresholds": [{"reject_rate": rate, "distance": far} for rate, far in thresholds.items()],
        },
        "\n".join(lines),
    )
