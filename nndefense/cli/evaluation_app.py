"""The subcommands that attack and measure: attack, evaluate and demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nndefense.cli.declare import Commas
from nndefense.cli.options import (
    EPS_GRID,
    KS,
    POOLINGS,
    SPEC_HELP,
    AdaptiveOption,
    AdaptiveStepsOption,
    AttackOption,
    AuditOption,
    BatchOption,
    ClassifierOptions,
    Common,
    DatasetOption,
    EpsOption,
    HeadlineOption,
    KOption,
    KsOption,
    LadderAttackOption,
    LayersOption,
    LimitOption,
    LossOption,
    NormOption,
    OverwriteOption,
    OwnOptions,
    PcaOption,
    PoolingsOption,
    QueriesOption,
    RestartsOption,
    RowsOption,
    StepsOption,
    SurrogateOption,
    WeightingOption,
    command_line,
    number,
    numbers,
    shape,
    words,
)
from nndefense.errors import InputError


def attack(
    *,
    dataset: DatasetOption,
    model: ClassifierOptions,
    out: Annotated[Path, typer.Option("--out", help="HDF5 file for the attacked images; opens as hdf5:FILE.")],
    attack: AttackOption = "pgd",
    norm: NormOption = "linf",
    eps: Annotated[str, typer.Option("--eps", help="Budget in units of the norm; 8/255 is fine.")] = "8/255",
    steps: StepsOption = None,
    queries: QueriesOption = None,
    restarts: RestartsOption = 1,
    limit: LimitOption = None,
    overwrite: OverwriteOption = False,
    batch_size: BatchOption = 128,
    common: Common,
) -> None:
    """Attack a classifier and keep the attacked images, unrounded."""
    from nndefense.cli import commands
    from nndefense.evaluation import AttackSettings

    commands.attack(
        dataset,
        model.classifier,
        out,
        AttackSettings(attack, norm, (number("--eps", eps),), steps, restarts, queries=queries),
        limit=limit,
        overwrite=overwrite,
        batch_size=batch_size,
        classes=model.classes,
        input_shape=model.shape,
        data_dir=common.data_dir,
        device=common.device,
        seed=common.seed,
        as_json=common.json,
        progress=common.progress,
    )


# What a comparison of defences takes; the rest of the options is for one defence over one database.
_COMPARES = {
    "comparison", "out", "dataset", "train_set", "only", "train", "classifier", "surrogate", "limit", "norm", "eps",
    "headline", "steps", "restarts", "adaptive_steps", "batch_size", "classes", "input_shape", "data_dir", "device",
    "seed", "json", "quiet", "debug",
}  # fmt: skip
_ONLY_COMPARES = {"train_set", "only", "train"}


def evaluate(
    ctx: typer.Context,
    *,
    comparison: Annotated[
        str | None,
        typer.Argument(help="table2: compare every defence of the paper's Table 2 on a data set.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for results.json, report.html and finished cells [a comparison has one]."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="TOML file that names all of it, instead of the options below.")
    ] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", help=SPEC_HELP)] = None,
    classifier: Annotated[
        str | None, typer.Option("--classifier", help="A trained folder, torchvision:NAME:WEIGHTS or python:...")
    ] = None,
    database: Annotated[
        Path | None, typer.Option("--database", help="Folder of the image database [default: no defence].")
    ] = None,
    train_set: Annotated[
        list[str] | None,
        typer.Option(
            "--train-set",
            help="With table2: images that fill databases and train nets [default: the training split of --dataset, "
            "whose test split is then reported].",
        ),
    ] = None,
    only: Annotated[str | None, Commas("--only", "With table2: kinds of defences, with commas [default: all].")] = None,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="With table2: also the defences whose nets are to be trained.")
    ] = True,
    surrogate: SurrogateOption = None,
    k: KOption = None,
    weighting: WeightingOption = None,
    attack: LadderAttackOption = "pgd",
    norm: NormOption = "normalized-l2",
    eps: EpsOption = EPS_GRID,
    headline: HeadlineOption = None,
    steps: StepsOption = None,
    queries: QueriesOption = None,
    restarts: RestartsOption = 1,
    adaptive: AdaptiveOption = True,
    adaptive_steps: AdaptiveStepsOption = 40,
    audit: AuditOption = True,
    sizes: Annotated[bool, typer.Option("--sizes/--no-sizes", help="Also search smaller databases.")] = True,
    gallery: Annotated[int, typer.Option(min=0, help="Images in the report's gallery.")] = 10,
    limit: LimitOption = None,
    batch_size: BatchOption = 128,
    own: OwnOptions,
    common: Common,
) -> None:
    """Measure the classifier and the defence, clean and attacked, and write results and report.

    Started again with the same --out, it goes on where it was stopped.
    """
    from nndefense.cli import commands
    from nndefense.evaluation import AttackSettings, Recipe, read_recipe, rungs_for
    from nndefense.pipeline import headline_of

    given = {
        name
        for name in ctx.params
        if (source := ctx.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }
    if comparison is not None:
        _compare(ctx.params | {"eps": eps, "only": only}, given)
        return
    if wrong := sorted(given & _ONLY_COMPARES):
        raise InputError(f"{_options(wrong)} belongs to a comparison: nndefense evaluate table2 ...")
    if out is None:
        raise InputError("give --out, the folder for results and report")
    if recipe is not None:
        if dataset or classifier or database or surrogate:
            raise InputError("--recipe names data, models and database itself: leave those options out")
        chosen = read_recipe(recipe)
    elif dataset is None or classifier is None:
        raise InputError("give --recipe, or --dataset and --classifier")
    else:
        budgets = numbers(eps)
        settings = AttackSettings(attack, norm, budgets, steps, restarts, queries=queries)
        models = ["gray", *(["black"] if surrogate else [])]
        models += ["white", "adaptive"] if adaptive and database is not None else []
        chosen = Recipe(
            dataset=dataset,
            classifier=classifier,
            database=str(database) if database is not None else None,
            rungs=rungs_for(models, settings, AttackSettings("adaptive", norm, budgets, adaptive_steps)),
            headline_norm=norm,
            headline_eps=number("--headline", headline) if headline else headline_of(database, budgets),
            surrogate=surrogate,
            classes=str(own.classes) if own.classes else None,
            input_shape=own.shape,
            limit=limit,
            k=k,
            weighting=weighting,
            sizes=sizes,
            audit=audit,
            gallery=gallery,
            batch_size=batch_size,
            seed=common.seed,
        )
    commands.evaluate(
        chosen,
        out,
        data_dir=common.data_dir,
        device=common.device,
        as_json=common.json,
        progress=common.progress,
        command=command_line(),
    )


def _compare(values: dict[str, Any], given: set[str]) -> None:
    """Hand the options of a comparison over; those that are not given are the recipe's."""
    from nndefense.cli import comparison

    if wrong := sorted(given - _COMPARES):
        raise InputError(f"{_options(wrong)} is for one defence, and not for a comparison: leave it out")
    if values["dataset"] is None:
        raise InputError("give --dataset, such as digits, mnist or cifar10")
    scope: dict[str, Any] = {
        name: values[name] for name in ("limit", "steps", "restarts", "adaptive_steps", "batch_size") if name in given
    }
    if "adaptive_steps" in given:
        # Both kinds of attackers who know the defence.
        scope["white_steps"] = values["adaptive_steps"]
    if "norm" in given:
        scope["norm"] = values["norm"]
    if "eps" in given:
        scope["eps"] = numbers(values["eps"])
    if "headline" in given:
        scope["headline"] = number("--headline", values["headline"])
    comparison.compare(
        values["comparison"],
        values["dataset"],
        values["out"],
        train_sets=values["train_set"] or (),
        classifier=values["classifier"],
        surrogate=values["surrogate"],
        kinds=words(values["only"]),
        train=values["train"],
        scope=scope,
        classes=values["classes"],
        input_shape=shape(values["input_shape"]),
        data_dir=values["data_dir"],
        device=values["device"],
        seed=values["seed"],
        as_json=values["json"],
        progress=not values["quiet"],
    )


def _options(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def demo(
    *,
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", help=SPEC_HELP + " It fills the database [default: digits].")
    ] = None,
    test: Annotated[
        str | None, typer.Option("--test", help="Data set to report on [default: the first one's split test].")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option("--calibration", help="Data set to calibrate on [default: hold images out].")
    ] = None,
    holdout: Annotated[int, typer.Option(min=1, help="Images to hold out of the first data set.")] = 300,
    out: Annotated[Path, typer.Option("--out", help="Folder for everything that is made.")] = Path("runs/demo"),
    classifier: Annotated[
        str | None, typer.Option("--classifier", help="A ready classifier [default: train one].")
    ] = None,
    surrogate: SurrogateOption = None,
    arch: Annotated[str, typer.Option(help="Architecture of the classifier that is trained.")] = "small-cnn",
    surrogate_arch: Annotated[str, typer.Option(help="Architecture of the surrogate.")] = "madry-mnist",
    epochs: Annotated[int | None, typer.Option(min=1, help="Training epochs [default: by the data's size].")] = None,
    attack: LadderAttackOption = "pgd",
    norm: NormOption = "normalized-l2",
    eps: EpsOption = EPS_GRID,
    headline: Annotated[str, typer.Option("--headline", help="The budget to calibrate for and to tabulate.")] = "0.2",
    steps: StepsOption = None,
    queries: QueriesOption = None,
    restarts: RestartsOption = 1,
    adaptive: AdaptiveOption = True,
    adaptive_steps: AdaptiveStepsOption = 20,
    audit: AuditOption = True,
    layers: LayersOption = None,
    poolings: PoolingsOption = POOLINGS,
    ks: KsOption = KS,
    pca: PcaOption = 256,
    max_clean_loss: LossOption = 0.02,
    candidate_rows: RowsOption = 20_000,
    limit: LimitOption = 2000,
    gallery: Annotated[int, typer.Option(min=0, help="Images in the report's gallery.")] = 10,
    batch_size: BatchOption = 128,
    own: OwnOptions,
    common: Common,
) -> None:
    """Do it all: train, calibrate, build the database, attack, defend, and report."""
    from nndefense.cli import commands
    from nndefense.evaluation import AttackSettings
    from nndefense.pipeline import Candidates, DemoSettings, reported_split

    sets, budgets = dataset or ["digits"], numbers(eps)
    settings = DemoSettings(
        database_sets=sets,
        test=test or reported_split(sets[0]),
        out=out,
        attack=AttackSettings(attack, norm, budgets, steps, restarts, queries=queries),
        adaptive=AttackSettings("adaptive", norm, budgets, adaptive_steps) if adaptive else None,
        headline_eps=number("--headline", headline),
        audit=audit,
        calibration=calibration,
        holdout=holdout,
        classifier=classifier,
        surrogate=surrogate,
        arch=arch,
        surrogate_arch=surrogate_arch,
        classes=own.classes,
        input_shape=own.shape,
        candidates=Candidates(
            layers=words(layers),
            poolings=words(poolings) or [],
            ks=[int(k) for k in numbers(ks, whole=True)],
            pca=pca,
            max_clean_loss=max_clean_loss,
            rows=candidate_rows,
        ),
        epochs=epochs,
        limit=limit,
        batch_size=batch_size,
        gallery=gallery,
        data_dir=common.data_dir,
        device=common.device,
        seed=common.seed,
        command=command_line(),
        progress=common.progress,
    )
    commands.demo(settings, as_json=common.json)
