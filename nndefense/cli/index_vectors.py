"""``nndefense index import`` and ``export``: vectors that other programs have made, or are to take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nndefense.cli.declare import OneOf, Only
from nndefense.cli.index_changes import index as index
from nndefense.cli.options import SPEC_HELP, Common, OverwriteOption, Printing


@index.command("import")
def import_(
    vectors: Annotated[Path, typer.Argument(help="Vectors N x d: a .npy, HDF5 or Parquet file, or a folder of them.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder for the database.")],
    metadata: Annotated[
        Path | None, typer.Option(help="Parquet with ids and labels, a row for each vector, or a folder of such files.")
    ] = None,
    posteriors: Annotated[
        Path | None, typer.Option(help="Posteriors N x C, likewise as the vectors [default: of the labels].")
    ] = None,
    column: Annotated[str, typer.Option(help="Array or column that holds them in HDF5 and Parquet.")] = "embedding",
    id_column: Annotated[
        str | None, typer.Option(help="Of the metadata [default: id, key, image_path or url].")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Of the metadata [default: label, class and the like].")
    ] = None,
    classes: Annotated[Path | None, typer.Option(help="Class names: a line each, or a CSV file.")] = None,
    classifier: Annotated[
        str | None,
        typer.Option(help="The net that makes such vectors [default: none; they are searched by vectors alone]."),
    ] = None,
    layer: Annotated[str | None, typer.Option(help="With --classifier: its layer that does.")] = None,
    pooling: Annotated[str, typer.Option(help="With --classifier: how that is pooled.")] = "avg",
    normalize: Annotated[bool, typer.Option("--normalize", help="With --classifier: vectors of length 1.")] = False,
    dataset: Annotated[
        str | None, typer.Option(help="With --classifier: images of some of the rows, to compare. " + SPEC_HELP)
    ] = None,
    index: Annotated[str, typer.Option(help="FAISS factory string; Flat is exact.")] = "Flat",
    overwrite: OverwriteOption = False,
    common: Annotated[Common, Only("data_dir", "device", "json", "quiet", "debug")],
) -> None:
    """Make a database of vectors that exist already.

    Without --classifier it can be described, verified, changed and exported, and searched by vectors from Python.
    """
    from index_build.vectors import import_vectors
    from nndefense.features import FeatureSpec
    from nndefense.models.classifier import read_classes
    from nndefense.pipeline import open_classifier, open_datasets

    net = open_classifier(classifier, device=common.device, data_dir=common.data_dir) if classifier else None
    made = import_vectors(
        vectors, out, metadata=metadata, posteriors=posteriors, column=column, id_column=id_column,
        label_column=label_column, classes=read_classes(classes)[0] if classes else (), classifier=net,
        feature=FeatureSpec(layer, pooling, 0, False, normalize) if layer else None,
        images=open_datasets([dataset], data_dir=common.data_dir, like=net) if dataset else None, index=index,
        overwrite=overwrite,
    )  # fmt: skip
    value = {"database": str(out), "rows": len(made), "dimension": made.dimension, "classes": len(made.classes)}
    common.show(value, f"{out}: {len(made):,} rows x {made.dimension} dimensions, {len(made.classes)} classes")


@index.command("export")
def export(
    database: Annotated[Path, typer.Argument(help="Folder of the database.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
    form: Annotated[str, OneOf("Of the vectors; ids and labels are Parquet.", ("npy", "parquet"))] = "npy",
    common: Printing,
) -> None:
    """Write vectors, posteriors, ids and labels for other programs."""
    from index_build.vectors import export_vectors
    from nndefense.database import ImageDatabase

    made = ImageDatabase.open(database)
    written = export_vectors(made, out, form=form)
    value = {"files": [str(path) for path in written], "rows": len(made)}
    common.show(value, f"{out}: {len(made):,} rows in {len(written)} files")
