"""Options of ``nndefense reproduce``; the work is imported when it is asked for."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from nndefense.cli.options import SPEC_HELP, DataDirOption, DebugOption, Device, DeviceOption, JsonOption, QuietOption


class Scale(str, Enum):
    """How large."""

    full = "full"
    small = "small"


def reproduce(
    name: Annotated[str | None, typer.Argument(help="A shipped recipe; --list names them.", show_default=False)] = None,
    scale: Annotated[Scale, typer.Option("--scale", help="full: as the papers, for a GPU; small: for two cores.")] = (
        Scale.full
    ),
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for everything [default: runs/reproduce/NAME-SCALE].")
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="How many seeds [default: the recipe's].")] = None,
    arch: Annotated[str | None, typer.Option("--arch", help="Another architecture than the recipe's.")] = None,
    unlabelled: Annotated[
        str | None,
        typer.Option(
            "--unlabelled",
            help="Pool of unlabelled images for self-training; then all others are labelled. " + SPEC_HELP,
        ),
    ] = None,
    attack: Annotated[
        str | None, typer.Option("--attack", help="Add an attack to the report: apgd, apgd-t, square or autoattack.")
    ] = None,
    device: DeviceOption = Device.auto,
    data_dir: DataDirOption = None,
    listed: Annotated[bool, typer.Option("--list", help="Only list the recipes.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write table, figure and page again from OUT/results.json.")
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a published experiment from a recipe: train, attack, write table, figure and page.

    The same command continues a run that was stopped.
    """
    from nndefense.cli import experiments

    if listed:
        experiments.list_recipes(as_json=json)
        return
    experiments.reproduce(
        name,
        scale.value,
        out,
        seeds=seeds,
        arch=arch,
        unlabelled=unlabelled,
        attack=attack,
        device=device.value,
        data_dir=data_dir,
        report_only=report_only,
        as_json=json,
        progress=not quiet,
    )
