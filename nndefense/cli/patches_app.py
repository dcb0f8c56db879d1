"""Options of ``nndefense index patches`` and ``patches-info``; the work is imported when it is asked for."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from nndefense.cli.options import (
    DataDirOption,
    DatasetsOption,
    DebugOption,
    JsonOption,
    LimitOption,
    OverwriteOption,
    QuietOption,
    SeedOption,
    shape,
)


class Storage(str, Enum):
    """How pixels are kept."""

    auto = "auto"
    uint8 = "uint8"
    float32 = "float32"


def patches(
    dataset: DatasetsOption,
    out: Annotated[Path, typer.Option("--out", help="Folder for the patch database.")],
    patches: Annotated[
        int, typer.Option("--patches", min=1, help="Patches to cut, at most all there are.")
    ] = 1_000_000,
    side: Annotated[int, typer.Option("--side", min=1, help="Side of a patch in pixels.")] = 5,
    storage: Annotated[
        Storage, typer.Option("--storage", help="auto: 8 bits where these lose nothing, else floats.")
    ] = Storage.auto,
    index: Annotated[
        str, typer.Option("--index", help="FAISS factory string; auto: Flat (exact) if small, else inverted lists.")
    ] = "auto",
    probes: Annotated[
        int | None, typer.Option("--probes", min=1, help="Inverted lists that a search looks into [default: 16].")
    ] = None,
    input_shape: Annotated[
        str | None, typer.Option("--input-shape", metavar="C,H,W", help="Bring the images to this shape before.")
    ] = None,
    limit: LimitOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images read at a time.")] = 128,
    overwrite: OverwriteOption = False,
    data_dir: DataDirOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Cut patches of images at random, for image quilting."""
    from nndefense.cli import patches as work

    work.build(
        dataset,
        out,
        input_shape=shape(input_shape),
        data_dir=data_dir,
        limit=limit,
        as_json=json,
        options={
            "patches": patches,
            "side": side,
            "storage": storage.value,
            "index": index,
            "probes": probes,
            "batch_size": batch_size,
            "overwrite": overwrite,
            "seed": seed,
            "progress": not quiet,
        },
    )


def patches_info(
    folder: Annotated[Path, typer.Argument(help="Folder of the patch database.")],
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Describe a patch database, and check every byte of it."""
    from nndefense.cli import patches as work

    work.info(folder, as_json=json)
