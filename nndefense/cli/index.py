"""``nndefense index``: a database in one go, or stage by stage."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nndefense.cli.declare import Group, OneOf, Only
from nndefense.cli.options import (
    BatchOption,
    ClassifierOptions,
    Common,
    DatasetsOption,
    LimitOption,
    OverwriteOption,
    PcaOption,
    Printing,
    RayAddressOption,
    RuleOptions,
)
from nndefense.errors import InputError

if TYPE_CHECKING:
    from nndefense.database import ImageDatabase, Manifest

index = Group(
    "index",
    "Build, describe and verify an image database. `build` runs all stages: extract, fit, add, merge, verify. "
    "Killed at any moment, the same command continues.",
)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

FolderArgument = Annotated[Path, typer.Argument(help="Folder of the unfinished build.")]
IndexDeviceOption = Annotated[
    str, typer.Option(help="Where the index is trained and filled: cpu, cuda, cuda:N or all-gpus.")
]
MemoryOption = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory for the index, such as 4G; larger inverted lists stay on disk."),
]
EngineOption = Annotated[
    str, OneOf("This process, or a Ray cluster whose machines share the folder.", ("local", "ray"))
]
RayWorkersOption = Annotated[
    int | None,
    typer.Option(min=1, help="With ray: processes at once [default: one for each machine, or each GPU]."),
]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Settings of a build, by the names that :func:`index_build.build_database` has for them."""

    index: Annotated[str, typer.Option(help="FAISS factory string; Flat is exact, auto chooses and says why.")] = "Flat"
    memory: MemoryOption = None
    recall: Annotated[float, typer.Option(help="Share of the nearest rows to find, for which the search is set.")] = (
        0.95
    )
    recall_k: Annotated[int, typer.Option(min=1, help="How many nearest rows that share is of.")] = 50
    pca_sample: Annotated[int, typer.Option(min=2, help="Images that PCA is fitted on.")] = 4096
    storage: Annotated[str, OneOf("How features are stored.", ("float32", "float16"))] = "float32"
    posteriors: Annotated[str, typer.Option(help="dense, top-M, or auto: dense up to 64 classes, else top-20.")] = (
        "auto"
    )
    precision: Annotated[
        str,
        OneOf(
            "Of the forward pass; auto measures what is faster and as good.",
            ("auto", "float32", "bfloat16", "float16"),
        ),
    ] = "float32"
    shard_rows: Annotated[
        int | None, typer.Option(min=1, help="Images per shard [default: at most 64 MiB of rows].")
    ] = None
    max_rejected: Annotated[
        str | None,
        typer.Option(help="Unreadable images that are too many: a number or 5% [default: any]."),
    ] = None
    row_noise: Annotated[
        float,
        typer.Option(help="Standard deviation of Gaussian noise on each image before its row is made, for smoothing."),
    ] = 0.0
    dedupe: Annotated[bool, typer.Option("--dedupe", help="Keep only the first of images with equal pixels.")] = False
    exclude_eps: Annotated[
        float | None, typer.Option(min=0, help="L2 distance that is near; 0: equal images only.")
    ] = None
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that read images [default: one per CPU].")] = None
    engine: EngineOption = "local"
    ray_address: RayAddressOption = None
    ray_workers: RayWorkersOption = None
    overwrite: OverwriteOption = False
    batch_size: BatchOption = 128


@index.command("build", "Build a database of images: features, posteriors, weights and the index.")
@index.command("extract", "The first stage of `build` alone, with the same options: images to rows.")
def build(
    context: typer.Context,
    *,
    dataset: DatasetsOption,
    model: ClassifierOptions,
    layer: Annotated[str, typer.Option(help="Module of the net, such as layer3.5, or conv_5_1.")],
    out: Annotated[Path, typer.Option(help="Folder for the database.")],
    pooling: Annotated[str, typer.Option(help="avg, max, rmac, gridG, flatten, or cls (class token).")] = "avg",
    pca: PcaOption = 256,
    whiten: Annotated[bool, typer.Option("--whiten", help="Scale PCA coordinates to variance 1.")] = False,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale vectors to length 1.")] = False,
    index_device: Annotated[
        str | None,
        typer.Option(help="Where the index is trained [default: the GPUs that --device names]."),
    ] = None,
    exclude: Annotated[str | None, typer.Option(help="Data set whose images, and all near them, are kept out.")] = None,
    limit: LimitOption = None,
    building: BuildOptions,
    rule: RuleOptions,
    device: Annotated[
        str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:N, or all-gpus (for the index).")
    ] = "auto",
    common: Annotated[Common, Only("data_dir", "seed", "json", "quiet", "debug")],
) -> None:
    """Run all stages, or the first."""
    from index_build import build_database, stages
    from nndefense.database import Rule
    from nndefense.defenses.stored import default_k, learned_rule
    from nndefense.features import FeatureSpec
    from nndefense.pipeline import open_datasets

    feature = FeatureSpec(layer, pooling, pca, whiten, normalize)
    settings = vars(building) | {"memory": size("--memory", building.memory), "k": building.recall_k}
    del settings["recall_k"]
    common = replace(common, device="cuda" if device == "all-gpus" else device)
    net = model.open(common, specs=dataset)
    images = open_datasets(dataset, data_dir=common.data_dir, like=net, limit=limit, seed=common.seed)
    asked, learned = rule.asked(), learned_rule(net, feature, len(images))
    if asked or learned:
        settings["rule"] = (learned or Rule(default_k(len(images)))).changed(**asked).to_json()
    settings |= {
        "specs": dataset,
        "seed": common.seed,
        "progress": common.progress,
        "exclude": open_datasets([exclude], data_dir=common.data_dir, like=net) if exclude else None,
        "reopen": {
            "classifier": model.classifier,
            "classes": str(model.classes) if model.classes else None,
            "input_shape": list(model.shape) if model.shape else None,
            "data_dir": str(common.data_dir) if common.data_dir else None,
            "limit": limit,
            "exclude": exclude,
        },
    }
    if context.info_name != "extract":
        on = index_device or ("cpu" if device in ("auto", "cpu") else device)
        _describe(build_database(images, net, feature, out, index_device=on, **settings), common)
        return
    found = stages.extract(images, net, feature, out, **settings)
    common.show(
        {"database": str(out), "rows": found.rows, "rejected": found.rejected},
        f"{out}: {found.rows:,} rows extracted{rejections(found.rejected)}; next: nndefense index fit {out}",
    )


@index.command("fit")
def fit(
    folder: FolderArgument,
    *,
    index: Annotated[str | None, typer.Option(help="Another index than the build was begun with, or auto.")] = None,
    memory: MemoryOption = None,
    device: IndexDeviceOption = "cpu",
    common: Printing,
) -> None:
    """Train the index on a sample of the rows."""
    from index_build import stages

    found = stages.fit(folder, index=index, memory=size("--memory", memory), device=device)
    why = f" ({found.why})" if found.why else ""
    common.show(
        {"database": str(folder), "factory": found.factory, "why": found.why, "mergeable": found.mergeable},
        f"{folder}: index {found.factory}{why} fitted; next: nndefense index add {folder}",
    )


@index.command("merge")
def merge(folder: FolderArgument, *, common: Printing) -> None:
    """Make one index of the parts, and the manifest: from then on the folder is a database."""
    from index_build import stages

    manifest = stages.merge(folder)
    common.show(
        {"database": str(folder), "rows": manifest.rows, "files": len(manifest.files)},
        f"{folder}: {manifest.rows:,} rows in one index; next: nndefense index verify {folder}",
    )


@index.command("info")
def info(database: Annotated[Path, typer.Argument(help="Folder of the database.")], *, common: Printing) -> None:
    """Describe a database."""
    from nndefense.database import ImageDatabase

    # Its rows are not read.
    _describe(ImageDatabase.open(database, verify=False), common)


@index.command("verify")
def verify(
    database: Annotated[Path, typer.Argument(help="Folder of the database.")],
    *,
    recall: Annotated[
        float | None, typer.Option(help="Measure the index anew, and set its search for this recall.")
    ] = None,
    recall_k: Annotated[int | None, typer.Option(min=1, help="K of that recall.")] = None,
    queries: Annotated[
        str | None,
        typer.Option(help="Measure with images of this data set [default: rows, each without itself]."),
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(help="The database must be made with it [default: not compared]; makes the vectors of --queries."),
    ] = None,
    seal: Annotated[
        bool,
        typer.Option(
            "--seal",
            help="Add checksums to records of older versions, those of the classifier's folder too, and take "
            "calibration.json and guard.json as they stand. Also for a classifier, patches or a guard's file.",
        ),
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="How many of them, drawn at random.")] = 1000,
    common: Annotated[Common, Only("data_dir", "device", "json", "quiet", "debug")],
) -> None:
    """Check every file's sha256, the row counts, that ids are unique and that the index holds every row.

    Also that manifest, calibration, guard and, where it is given, classifier belong together.

    An unfinished build is finished with it: recall and speed of its index are measured, and its search is set.
    """
    from index_build import stages
    from nndefense.database import ImageDatabase
    from nndefense.pipeline import check_parts, open_classifier, seal_records
    from nndefense.pipeline.sealing import is_database

    sealed = [str(path) for path in seal_records(database, classifier)] if seal else []
    if sealed and not is_database(database):
        common.show({"path": str(database), "ok": True, "sealed": sealed}, _sealed_text(sealed))
        return
    net = None
    if classifier is not None:
        net = open_classifier(classifier, device=common.device, data_dir=common.data_dir, database=database)
    opened = ImageDatabase.open(database, verify=False)
    parts = check_parts(opened, net)
    settings: dict[str, Any] = {"recall": recall, "k": recall_k}
    if queries is not None:
        settings |= {"queries": _vectors(database, queries, classifier, limit, common), "queries_from": queries}
    found = stages.verify(database, **settings) | parts
    text = f"{database} is whole: {found['rows']:,} rows, {found['files']} files with the right sha256, no id twice"
    if "search" in found:
        text += f"\n{_search_text(found['search'])}"
    text += f"\n{_rule_text(parts, opened.manifest)}"
    if parts["guard"]:
        text += f"\nguard      {parts['guard']:,} distances of this database"
    text += "\nclassifier " + ("as given" if net is not None else "not compared: --classifier names one")
    if sealed:
        text = f"{_sealed_text(sealed)}\n{text}"
        found["sealed"] = sealed
    common.show({"database": str(database), "ok": True, **found}, text)


def _sealed_text(paths: list[str]) -> str:
    return f"sealed: {', '.join(paths)}"


def _describe(database: ImageDatabase, common: Common) -> None:
    """Print what a database is."""
    from nndefense.database.growing import outgrown
    from nndefense.defenses.stored import chosen_values, stored_calibration, stored_rule

    manifest = database.manifest
    size = sum(entry.bytes for entry in manifest.files.values())
    calibration = stored_calibration(database.path, manifest)
    rule = stored_rule(database.path, manifest, calibration)
    parts = {"calibrated": chosen_values(calibration) or None, "rule": rule.to_json() | {"text": str(rule)}}
    found = {
        "database": str(database.path),
        "rows": len(database),
        "dimension": database.dimension,
        "classes": len(database.classes),
        "feature": manifest.feature,
        "classifier": manifest.classifier,
        "data": manifest.data,
        "index": manifest.index,
        "storage": manifest.storage,
        "rejected": manifest.rejected,
        "row_noise": manifest.build.get("row_noise", 0.0),
        "fingerprint": database.fingerprint,
        "bytes": size,
        "created": manifest.created,
        "versions": manifest.versions,
        **parts,
    }
    text = (
        f"{database.path}: {len(database):,} rows x {database.dimension} dimensions, {len(database.classes)} classes\n"
        f"feature    {database.feature}\n"
        f"index      {manifest.index['factory']} ({manifest.index['metric']})\n"
        f"data       {manifest.data['name']}\n"
        f"classifier {_made_by(manifest)}\n"
        f"size       {size / 1e6:.1f} MB, built {manifest.created}"
    )
    if "search" in manifest.index:
        text += f"\n{_search_text(manifest.index['search'])}"
    if found["row_noise"]:
        text += f"\nrow noise  {found['row_noise']} (standard deviation, in pixels of [0, 1])"
    if manifest.rejected:
        text += f"\nleft out   {counted(manifest.rejected)}"
    for change in manifest.data.get("changes", []):
        what = ", ".join(f"{change[kind]:,} {kind}" for kind in ("added", "removed") if kind in change)
        text += f"\nchanged    {what} ({change['before']:,} rows before)"
    if note := outgrown(manifest):
        text += f"\n{note}"
    common.show(found, f"{text}\n{_rule_text(parts, manifest)}")


def _made_by(manifest: Manifest) -> str:
    """The classifier of a database, in words."""
    made = manifest.classifier
    return (
        f"{made['source']} ({made['fingerprint'][:12]})" if made["fingerprint"] else "none: its vectors were imported"
    )


def _rule_text(parts: dict[str, Any], manifest: Manifest) -> str:
    """The rule that a database is to be used with, as one line."""
    before = "" if manifest.first_rows is None else f" for the {manifest.first_rows:,} rows before it was changed"
    return f"rule       {parts['rule']['text']}" + (f" (calibrated{before})" if parts["calibrated"] else "")


def _search_text(search: dict[str, Any]) -> str:
    """What was measured of an index, as one line."""
    setting = ", ".join(f"{name} {value}" for name, value in search["setting"].items())
    return (
        f"search     {f'{setting}: ' if setting else ''}recall@{search['k']} {search['recall']:.3f} "
        f"(wanted {search['wanted']:g}), {search['queries_per_second']:,.0f} queries/s"
        + (f", measured on {search['rows']:,} rows" if "rows" in search else "")
    )


def _vectors(folder: Path, queries: str, source: str | None, limit: int, common: Common) -> Any:
    """The feature vectors of images to look for, made with the database's classifier."""
    from index_build import stages
    from nndefense.database import ImageDatabase
    from nndefense.datasets import measured_spec
    from nndefense.pipeline import open_classifier, open_datasets

    net = open_classifier(source, device=common.device, data_dir=common.data_dir, database=folder)
    opened = ImageDatabase.open(folder, classifier=net, verify=False)
    spec = measured_spec(queries, data_dir=common.data_dir)
    images = open_datasets([spec], data_dir=common.data_dir, like=net, limit=limit)
    return stages.vectors_of(opened, net, images)


def size(option: str, text: str | None) -> int | None:
    """Read ``500M`` or ``15GB`` as bytes.

    Raises:
        InputError: the text is no size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", text.strip().upper())
    if match is None:
        raise InputError(f"{option} is {text!r}, but must be a size such as 500M or 15G")
    return int(float(match[1]) * _UNITS[match[2]])


def rejections(counts: dict[str, int]) -> str:
    """How many images were left out and why, to follow the number of rows; empty where none was."""
    if not counts:
        return ""
    return f", {sum(counts.values()):,} images left out ({counted(counts)}; see rejected.jsonl)"


def counted(counts: dict[str, int]) -> str:
    """Numbers by kind, as text."""
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
