"""The subcommands of ``nndefense index``: a database in one go, or stage by stage."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from nndefense.cli.options import (
    BatchOption,
    ClassesOption,
    ClassifierOption,
    DataDirOption,
    DatasetsOption,
    DebugOption,
    Device,
    DeviceOption,
    JsonOption,
    LimitOption,
    OverwriteOption,
    PcaOption,
    QuietOption,
    SeedOption,
    ShapeOption,
    shape,
)


class Storage(str, Enum):
    """How features are stored."""

    float32 = "float32"
    float16 = "float16"


class Precision(str, Enum):
    """How the forward pass computes."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Engine(str, Enum):
    """Where the stages extract and add run."""

    local = "local"
    ray = "ray"


FolderArgument = Annotated[Path, typer.Argument(help="Folder of the unfinished build.")]
IndexDeviceOption = Annotated[
    str, typer.Option("--device", help="Where the index is trained and filled: cpu, cuda, cuda:N or all-gpus.")
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory", metavar="SIZE", help="Memory for the index, such as 4G; larger inverted lists stay on disk."
    ),
]

EngineOption = Annotated[
    Engine, typer.Option("--engine", help="This process, or a Ray cluster whose machines share the folder.")
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="HOST:PORT",
        help="With ray: the cluster to join [default: one on this machine is started].",
    ),
]
RayWorkersOption = Annotated[
    int | None,
    typer.Option(
        "--ray-workers", min=1, help="With ray: processes at once [default: one for each machine, or each GPU]."
    ),
]

index_app = typer.Typer(
    no_args_is_help=True,
    help="Build, describe and verify an image database. `build` runs all stages: extract, fit, add, merge, verify. "
    "Killed at any moment, the same command continues.",
)


@index_app.command("build", help="Build a database of images: features, posteriors, weights and the index.")
@index_app.command("extract", help="The first stage of `build` alone, with the same options: images to rows.")
def build_or_extract(
    context: typer.Context,
    dataset: DatasetsOption,
    classifier: ClassifierOption,
    layer: Annotated[str, typer.Option("--layer", help="Module of the net, such as layer3.5, or conv_5_1.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the database.")],
    pooling: Annotated[str, typer.Option("--pooling", help="avg, max, rmac, gridG or flatten.")] = "avg",
    pca: PcaOption = 256,
    whiten: Annotated[bool, typer.Option("--whiten", help="Scale PCA coordinates to variance 1.")] = False,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale vectors to length 1.")] = False,
    index: Annotated[
        str, typer.Option("--index", help="FAISS factory string; Flat is exact, auto chooses and says why.")
    ] = "Flat",
    memory: MemoryOption = None,
    recall: Annotated[
        float, typer.Option("--recall", help="Share of the nearest rows to find, for which the search is set.")
    ] = 0.95,
    recall_k: Annotated[int, typer.Option("--recall-k", min=1, help="How many nearest rows that share is of.")] = 50,
    index_device: Annotated[
        str | None,
        typer.Option("--index-device", help="Where the index is trained [default: the GPUs that --device names]."),
    ] = None,
    pca_sample: Annotated[int, typer.Option(min=2, help="Images that PCA is fitted on.")] = 4096,
    storage: Annotated[Storage, typer.Option("--storage", help="How features are stored.")] = Storage.float32,
    posteriors: Annotated[
        str, typer.Option("--posteriors", help="dense, top-M, or auto: dense up to 64 classes, else top-20.")
    ] = "auto",
    precision: Annotated[
        Precision, typer.Option("--precision", help="Of the forward pass; auto measures what is faster and as good.")
    ] = Precision.float32,
    shard_rows: Annotated[
        int | None, typer.Option("--shard-rows", min=1, help="Images per shard [default: at most 64 MiB of rows].")
    ] = None,
    max_rejected: Annotated[
        str | None,
        typer.Option("--max-rejected", help="Unreadable images that are too many: a number or 5% [default: any]."),
    ] = None,
    dedupe: Annotated[bool, typer.Option("--dedupe", help="Keep only the first of images with equal pixels.")] = False,
    exclude: Annotated[
        str | None, typer.Option("--exclude", help="Data set whose images, and all near them, are kept out.")
    ] = None,
    exclude_eps: Annotated[
        float | None, typer.Option("--exclude-eps", min=0, help="L2 distance that is near; 0: equal images only.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Threads that read images [default: one per CPU].")
    ] = None,
    engine: EngineOption = Engine.local,
    ray_address: RayAddressOption = None,
    ray_workers: RayWorkersOption = None,
    overwrite: OverwriteOption = False,
    limit: LimitOption = None,
    batch_size: BatchOption = 128,
    classes: ClassesOption = None,
    input_shape: ShapeOption = None,
    data_dir: DataDirOption = None,
    device: Annotated[
        str, typer.Option("--device", help="Where to compute: auto, cpu, cuda, cuda:N, or all-gpus (for the index).")
    ] = "auto",
    seed: SeedOption = 0,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Run all stages, or the first."""
    from nndefense.cli import index as commands
    from nndefense.features import FeatureSpec

    commands.build(
        dataset,
        classifier,
        FeatureSpec(layer, pooling, pca, whiten, normalize),
        out,
        rows_only=context.info_name == "extract",
        classes=classes,
        input_shape=shape(input_shape),
        data_dir=data_dir,
        device="cuda" if device == "all-gpus" else device,
        limit=limit,
        exclude=exclude,
        as_json=json,
        options={
            "index": index,
            "memory": commands.size("--memory", memory),
            "recall": recall,
            "k": recall_k,
            "index_device": index_device or ("cpu" if device in ("auto", "cpu") else device),
            "pca_sample": pca_sample,
            "storage": storage.value,
            "posteriors": posteriors,
            "precision": precision.value,
            "shard_rows": shard_rows,
            "max_rejected": max_rejected,
            "dedupe": dedupe,
            "exclude_eps": exclude_eps,
            "workers": workers,
            "engine": engine.value,
            "ray_address": ray_address,
            "ray_workers": ray_workers,
            "overwrite": overwrite,
            "batch_size": batch_size,
            "seed": seed,
            "progress": not quiet,
        },
    )


@index_app.command("fit")
def index_fit(
    folder: FolderArgument,
    index: Annotated[
        str | None, typer.Option("--index", help="Another index than the build was begun with, or auto.")
    ] = None,
    memory: MemoryOption = None,
    device: IndexDeviceOption = "cpu",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train the index on a sample of the rows."""
    from nndefense.cli import index as commands

    commands.fit(folder, index=index, memory=commands.size("--memory", memory), device=device, as_json=json)


@index_app.command("add")
def index_add(
    folder: FolderArgument,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Parts made at once, each in memory.")] = 1,
    engine: EngineOption = Engine.local,
    ray_address: RayAddressOption = None,
    ray_workers: RayWorkersOption = None,
    device: IndexDeviceOption = "cpu",
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Add the rows to parts of the index."""
    from nndefense.cli import index as commands

    commands.add(
        folder,
        as_json=json,
        workers=workers,
        device=device,
        engine=engine.value,
        ray_address=ray_address,
        ray_workers=ray_workers,
        progress=not quiet,
    )


@index_app.command("merge")
def index_merge(folder: FolderArgument, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Make one index of the parts, and the manifest: from then on the folder is a database."""
    from nndefense.cli import index as commands

    commands.merge(folder, as_json=json)


@index_app.command("info")
def index_info(
    database: Annotated[Path, typer.Argument(help="Folder of the database.")],
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Describe a database."""
    from nndefense.cli import index as commands

    commands.info(database, as_json=json)


@index_app.command("verify")
def index_verify(
    database: Annotated[Path, typer.Argument(help="Folder of the database.")],
    recall: Annotated[
        float | None, typer.Option("--recall", help="Measure the index anew, and set its search for this recall.")
    ] = None,
    recall_k: Annotated[int | None, typer.Option("--recall-k", min=1, help="K of that recall.")] = None,
    queries: Annotated[
        str | None,
        typer.Option("--queries", help="Measure with images of this data set [default: rows, each without itself]."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many of them, drawn at random.")] = 1000,
    data_dir: DataDirOption = None,
    device: DeviceOption = Device.auto,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check every file's sha256, the row counts, that ids are unique and that the index holds every row.

    An unfinished build is finished with it: recall and speed of its index are measured, and its search is set.
    """
    from nndefense.cli import index as commands

    commands.verify(
        database,
        recall=recall,
        k=recall_k,
        queries=queries,
        limit=limit,
        data_dir=data_dir,
        device=device.value,
        as_json=json,
    )
