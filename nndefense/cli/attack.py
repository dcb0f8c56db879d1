"""``nndefense attack``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nndefense.cli.options import (
    AttackOptions,
    BatchOption,
    ClassifierOptions,
    Common,
    LimitOption,
    MeasuredOption,
    OverwriteOption,
    number,
)
from nndefense.errors import InputError

_LINF = AttackOptions(norm="linf")


def attack(
    *,
    dataset: MeasuredOption,
    model: ClassifierOptions,
    out: Annotated[Path, typer.Option(help="HDF5 file for the attacked images; opens as hdf5:FILE.")],
    by: AttackOptions = _LINF,
    eps: Annotated[str, typer.Option(help="Budget in units of the norm; 8/255 is fine.")] = "8/255",
    limit: LimitOption = None,
    overwrite: OverwriteOption = False,
    batch_size: BatchOption = 128,
    common: Common,
) -> None:
    """Attack a classifier and keep the attacked images, unrounded."""
    from nndefense.datasets import measured_spec
    from nndefense.pipeline import open_datasets, write_attacked

    settings = by.settings((number("--eps", eps),))
    # Before anything is loaded.
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists: choose another file, or --overwrite")
    dataset = measured_spec(dataset, data_dir=common.data_dir)
    net = model.open(common, specs=[dataset])
    found = write_attacked(
        settings,
        net,
        open_datasets([dataset], data_dir=common.data_dir, like=net, limit=limit, seed=common.seed),
        out,
        overwrite=overwrite,
        batch_size=batch_size,
        seed=common.seed,
        progress=common.progress,
    )
    text = "; ".join(
        f"{name} accuracy {found[name]['accuracy']:.3f} [{found[name]['ci_low']:.3f}, {found[name]['ci_high']:.3f}]"
        for name in ("clean", "attacked")
    )
    common.show(found, f"{out}: {found['n']:,} images of {found['dataset']}; {text}")
