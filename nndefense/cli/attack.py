"""``nndefense attack``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
from nndefense.cli.streams import one_line
from nndefense.errors import InputError

_LINF = AttackOptions(norm="linf")


def attack(
    *,
    dataset: MeasuredOption,
    model: ClassifierOptions,
    out: Annotated[Path, typer.Option(help="HDF5 file for the attacked images; opens as hdf5:FILE.")],
    by: AttackOptions = _LINF,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS|least-likely|random",
            help="Class to reach, by name, id or number; that held for the least likely; or one drawn for each image "
            "[default: any but its own].",
        ),
    ] = None,
    eps: Annotated[str, typer.Option(help="Budget in units of the norm; 8/255 is fine.")] = "8/255",
    limit: LimitOption = None,
    overwrite: OverwriteOption = False,
    batch_size: BatchOption = 128,
    common: Common,
) -> None:
    """Attack a classifier and keep the attacked images, unrounded; with --target towards a class."""
    from nndefense.datasets import measured_spec
    from nndefense.pipeline import open_datasets, write_attacked

    settings = by.settings((number("--eps", eps),))
    # Before anything is loaded.
    if target is not None:
        settings.attack.check_targeted()
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists: choose another file, or --overwrite")
    dataset = measured_spec(dataset, data_dir=common.data_dir)
    net = model.open(common, specs=[dataset])
    found = write_attacked(
        settings,
        net,
        open_datasets([dataset], data_dir=common.data_dir, like=net, limit=limit, seed=common.seed),
        out,
        target=target,
        overwrite=overwrite,
        batch_size=batch_size,
        seed=common.seed,
        progress=common.progress,
    )
    text = f"{out}: {found['n']:,} images of {found['dataset']}"
    for name in ("clean", "attacked"):
        side = found[name]
        text += f"; {name} accuracy {_share(side, 'accuracy')}, mean confidence {side['confidence']:.3f}"
        if side["confidence_wrong"] is not None:
            text += f", mean confidence in wrong answers {side['confidence_wrong']:.3f}"
    if "target" in found:
        aim = found["target"]
        text += (
            f"\ntarget {one_line(aim['asked'])}: reached by {_share(aim['success'])} of {aim['n']:,} images of other "
            f"classes ({aim['before']['share']:.3f} before), {_share(aim['merely_wrong'])} wrong in another class"
        )
        text += "" if aim["confidence"] is None else f"; mean confidence in the target {aim['confidence']:.3f}"
    common.show(found, text)


def _share(found: dict[str, Any], name: str = "share") -> str:
    return f"{found[name]:.3f} [{found['ci_low']:.3f}, {found['ci_high']:.3f}]"
