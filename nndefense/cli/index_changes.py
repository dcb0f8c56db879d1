"""``nndefense index`` on a database that is there: more images, fewer, and fewer files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nndefense.cli.declare import Only
from nndefense.cli.index import EngineOption, IndexDeviceOption, MemoryOption, RayWorkersOption, counted, size
from nndefense.cli.index import index as index
from nndefense.cli.options import SPEC_HELP, Common, Printing, RayAddressOption
from nndefense.errors import InputError

if TYPE_CHECKING:
    from nndefense.database import Manifest


@index.command("add")
def add(
    folder: Annotated[Path, typer.Argument(help="Folder of the unfinished build; with --dataset, of the database.")],
    *,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Add these images to a finished database. Repeat it to join several. " + SPEC_HELP),
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(help="With --dataset: the database's classifier [default: as its manifest says].")
    ] = None,
    exclude: Annotated[
        str | None, typer.Option(help="With --dataset: data set whose images, and all near them, are kept out.")
    ] = None,
    exclude_eps: Annotated[
        float | None, typer.Option(min=0, help="L2 distance that is near; 0: equal images only.")
    ] = None,
    max_rejected: Annotated[
        str | None,
        typer.Option(help="With --dataset: unreadable images that are too many, a number or 5% [default: any]."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="With --dataset: images per forward pass [default: as it was built].")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --dataset: drop what was being added and is not finished.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Parts made at once, each in memory [default: 1]; with --dataset, threads that read images [default: "
            "one per CPU].",
        ),
    ] = None,
    engine: EngineOption = "local",
    ray_address: RayAddressOption = None,
    ray_workers: RayWorkersOption = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where the index is filled: cpu, cuda, cuda:N or all-gpus [default: cpu]; with --dataset, where the "
            "net computes [default: auto]."
        ),
    ] = None,
    common: Annotated[Common, Only("data_dir", "json", "quiet", "debug")],
) -> None:
    """Add more images to a finished database (--dataset); or, as a stage of a build, its rows to parts of the index."""
    from index_build import stages

    if dataset:
        if engine != "local" or ray_address or ray_workers:
            raise InputError(
                "images are added to a database by this process: leave --engine, --ray-address and --ray-workers out"
            )
        settings = {"exclude_eps": exclude_eps, "max_rejected": max_rejected, "batch_size": batch_size}
        settings |= {"overwrite": overwrite, "workers": workers}
        _grow(folder, dataset, classifier, exclude, settings, replace(common, device=device or "auto"))
        return
    if classifier or exclude or exclude_eps is not None or max_rejected or batch_size or overwrite:
        raise InputError("--classifier, --exclude and the like are for images that are added: name them by --dataset")
    parts = stages.add(
        folder,
        workers=workers or 1,
        device=device or "cpu",
        engine=engine,
        ray_address=ray_address,
        ray_workers=ray_workers,
        progress=common.progress,
    )
    what = f"{parts} parts of the index made" if parts else "an index of this kind has no parts: merge adds all rows"
    common.show({"database": str(folder), "parts": parts}, f"{folder}: {what}; next: nndefense index merge {folder}")


def _grow(
    folder: Path,
    dataset: list[str],
    classifier: str | None,
    exclude: str | None,
    settings: dict[str, Any],
    common: Common,
) -> None:
    """Add images to a finished database, and tell what became of them."""
    from index_build import grow_database
    from nndefense.database import Manifest
    from nndefense.pipeline import open_classifier, open_datasets

    before = Manifest.read(folder)
    net = open_classifier(classifier, device=common.device, data_dir=common.data_dir, database=folder)
    images = open_datasets(dataset, data_dir=common.data_dir, like=net)
    kept_out = open_datasets([exclude], data_dir=common.data_dir, like=net) if exclude else None
    made = grow_database(images, net, folder, specs=dataset, exclude=kept_out, progress=common.progress, **settings)
    left = f"; {sum(made.rejected.values()):,} images left out ({counted(made.rejected)})" if made.rejected else ""
    value = {"database": str(folder), "rows": made.rows, "added": made.added, "rejected": made.rejected}
    _tell_changed(value, f"{folder}: {made.added:,} rows added, {made.rows:,} now{left}", before, made.manifest, common)


def _tell_changed(value: dict[str, Any], text: str, before: Manifest, now: Manifest, common: Common) -> None:
    """Print what was changed, and what that means for index, calibration and guard."""
    from nndefense.database.growing import outgrown
    from nndefense.database.manifest import CALIBRATION, GUARD

    notes = [note] if (note := outgrown(now)) else []
    if now.fingerprint != before.fingerprint and CALIBRATION in now.beside and now.first_rows is not None:
        notes.append(f"its rule was calibrated for the {now.first_rows:,} rows before it was changed, and stays")
    if now.fingerprint != before.fingerprint and GUARD in before.beside:
        notes.append(
            "the guard's distances were of the database before and are gone: run 'nndefense guard calibrate' again"
        )
    common.show({**value, "notes": notes}, "\n".join([text, *notes]))


@index.command("remove")
def remove(
    database: Annotated[Path, typer.Argument(help="Folder of the database.")],
    *,
    id: Annotated[list[str] | None, typer.Option(help="Id of an image whose row is removed. Repeat it.")] = None,
    ids: Annotated[Path | None, typer.Option(help="File with such ids, a line each.")] = None,
    common: Printing,
) -> None:
    """Take the rows of images out of a database; all others keep their ids and their order."""
    from index_build import remove_images
    from nndefense.database import Manifest
    from nndefense.files import read_whole, text_lines

    named = list(id or [])
    if ids is not None:
        try:
            named += [line for line in text_lines(read_whole(ids).decode("utf-8", "surrogateescape")) if line]
        except OSError as error:
            raise InputError(f"{ids} cannot be read ({error.strerror}): give a file with an id a line") from error
    before = Manifest.read(database)
    made = remove_images(database, named)
    gone = before.rows - made.rows
    value = {"database": str(database), "rows": made.rows, "removed": gone}
    text = f"{database}: {gone:,} rows removed, {made.rows:,} left; 'nndefense index compact' wipes their files"
    _tell_changed(value, text, before, made, common)


@index.command("compact")
def compact(
    database: Annotated[Path, typer.Argument(help="Folder of the database.")],
    *,
    index: Annotated[
        str | None, typer.Option(help="Train this index on the rows as they are now: a FAISS factory string, or auto.")
    ] = None,
    memory: MemoryOption = None,
    device: IndexDeviceOption = "cpu",
    common: Printing,
) -> None:
    """Join the small files that additions have made, and remove those that changes have replaced.

    With --index, the index is trained anew; the rows stay as they are.
    """
    from index_build import compact_database
    from nndefense.database import Manifest

    before = Manifest.read(database)
    made = compact_database(database, index=index, memory=size("--memory", memory), device=device)
    value = {"database": str(database), "rows": made.rows, "files": len(made.files), "index": made.index["factory"]}
    text = f"{database}: {made.rows:,} rows in {len(made.shards)} files, {len(before.shards)} before"
    _tell_changed(value, f"{text}; index {made.index['factory']}", before, made, common)
