"""``nndefense index patches`` and ``patches-info``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nndefense.cli.declare import OneOf, Only
from nndefense.cli.index_vectors import index as index
from nndefense.cli.options import Common, DatasetsOption, LimitOption, OverwriteOption, Printing, shape

if TYPE_CHECKING:
    from nndefense.defenses.quilting import PatchDatabase


@index.command("patches")
def patches(
    *,
    dataset: DatasetsOption,
    out: Annotated[Path, typer.Option(help="Folder for the patch database.")],
    patches: Annotated[int, typer.Option(min=1, help="Patches to cut, at most all there are.")] = 1_000_000,
    side: Annotated[int, typer.Option(min=1, help="Side of a patch in pixels.")] = 5,
    storage: Annotated[
        str,
        OneOf("auto: 8 bits where these lose nothing, else floats.", ("auto", "uint8", "float32")),
    ] = "auto",
    index: Annotated[
        str, typer.Option(help="FAISS factory string; auto: Flat (exact) if small, else inverted lists.")
    ] = "auto",
    probes: Annotated[
        int | None, typer.Option(min=1, help="Inverted lists that a search looks into [default: 16].")
    ] = None,
    input_shape: Annotated[
        str | None, typer.Option(metavar="C,H,W", help="Bring the images to this shape before.")
    ] = None,
    limit: LimitOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images read at a time.")] = 128,
    overwrite: OverwriteOption = False,
    common: Annotated[Common, Only("data_dir", "seed", "json", "quiet", "debug")],
) -> None:
    """Cut patches of images at random, for image quilting."""
    from index_build.patches import build_patches
    from nndefense.pipeline import open_datasets

    images = open_datasets(dataset, data_dir=common.data_dir, like=shape(input_shape), limit=limit, seed=common.seed)
    made = build_patches(
        images,
        out,
        specs=dataset,
        patches=patches,
        side=side,
        storage=storage,
        index=index,
        probes=probes,
        batch_size=batch_size,
        overwrite=overwrite,
        seed=common.seed,
        progress=common.progress,
    )
    _describe(made, common)


@index.command("patches-info")
def patches_info(
    folder: Annotated[Path, typer.Argument(help="Folder of the patch database.")], *, common: Printing
) -> None:
    """Describe a patch database, and check every byte of it."""
    from nndefense.defenses.quilting import PatchDatabase

    _describe(PatchDatabase.open(folder), common)


def _describe(patches: PatchDatabase, common: Common) -> None:
    from nndefense.images import shape_text

    manifest = patches.manifest
    size = sum(entry.bytes for entry in manifest.files.values())
    found = {
        "patches": str(patches.path),
        "count": len(patches),
        "shape": [patches.channels, patches.side, patches.side],
        "storage": manifest.storage,
        "data": manifest.data,
        "seed": manifest.seed,
        "index": manifest.index,
        "fingerprint": patches.fingerprint,
        "bytes": size,
        "created": manifest.created,
        "versions": manifest.versions,
    }
    factory, probes = manifest.index["factory"], manifest.index["probes"]
    search = "none, exact search in torch" if factory is None else factory
    text = (
        f"{patches.path}: {len(patches):,} patches {shape_text((patches.channels, patches.side, patches.side))}, "
        f"{manifest.storage}\n"
        f"index      {search}{f', {probes} lists a search' if probes else ''}\n"
        f"data       {manifest.data['name']} ({manifest.data['images']:,} images)\n"
        f"size       {size / 1e6:.1f} MB, built {manifest.created}"
    )
    common.show(found, text)
