"""``nndefense evaluate``: one defence over one database, or, by the name of a comparison, all of a published table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nndefense.certificates import registry as certificates
from nndefense.cli.declare import Commas, OneOf
from nndefense.cli.options import (
    AttackOptions,
    BatchOption,
    Common,
    EpsOption,
    ImagesOption,
    LadderAttackOption,
    LimitOption,
    MaybeMeasuredOption,
    OwnOptions,
    RuleOptions,
    SigmaOption,
    command_line,
    number,
    numbers,
    words,
)
from nndefense.errors import InputError
from nndefense.own_code import check_allowed
from nndefense.pipeline import defenses
from nndefense.recipes import read_toml

if TYPE_CHECKING:
    from nndefense.comparison import ComparisonRecipe
    from nndefense.evaluation import AttackSettings


@dataclass(frozen=True, kw_only=True)
class RungOptions(AttackOptions):
    """The ladder of attackers, from one who has nothing of the defence to one who has all of it."""

    attack: LadderAttackOption = "pgd"
    surrogate: Annotated[
        str | None, typer.Option(help="Classifier whose gradients the black-box attacker follows.")
    ] = None
    eps: EpsOption = "0.05,0.1,0.15,0.2,0.25,0.3"
    adaptive: Annotated[
        bool,
        typer.Option("--adaptive/--no-adaptive", help="Also attack the retrieval itself, with full knowledge of it."),
    ] = True
    adaptive_steps: Annotated[int, typer.Option(min=1, help="Steps of each adaptive attack.")] = 100
    exact: Annotated[
        bool,
        typer.Option("--exact/--no-exact", help="Also prove what no attack can lower, where the feature is affine."),
    ] = False
    abstain: Annotated[
        str | None,
        Commas(
            "Also measure what abstaining is worth at these rates of rejected clean images, such as 0.01,0.05,0.1: "
            "by the margins of net and retrieval, their disagreement and the distance, also under an attack that must "
            "be accepted."
        ),
    ] = None
    abstain_on: Annotated[
        str | None,
        typer.Option(
            help="Clean images that the thresholds of --abstain are set on [default: those of the database's source "
            "that do not stand in it]."
        ),
    ] = None
    abstain_steps: Annotated[int, typer.Option(min=1, help="Steps of the attack that must be accepted.")] = 40
    certify: Annotated[
        str | None, OneOf("Also certify, so that a floor stands beside the attacks.", certificates.names)
    ] = None
    sigma: SigmaOption = None
    draws: Annotated[int, typer.Option(min=1, help="Draws of noise for each image.")] = 1000
    audit: Annotated[bool, typer.Option("--audit/--no-audit", help="Also make the audit's own runs.")] = True
    gallery: Annotated[int, typer.Option(min=0, help="Images in the report's gallery.")] = 10

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budgets as numbers."""
        return numbers("--eps", self.eps)

    @property
    def adaptive_settings(self) -> AttackSettings:
        """The attacks of whoever knows the retrieval."""
        from nndefense.evaluation import AttackSettings

        return AttackSettings("adaptive", self.norm, self.budgets, self.adaptive_steps, self.restarts)


# What a comparison of defences takes; the rest of the options is for one defence over one database.
_COMPARES = {
    "comparison", "out", "recipe", "allow_code", "dataset", "train_set", "only", "train", "scope", "layer", "k",
    "weighting", "votes", "temperature", "alpha", "classifier", "surrogate", "limit", "norm", "eps", "headline",
    "steps", "restarts", "adaptive_steps", "batch_size", "classes", "input_shape", "data_dir", "device", "seed",
    "json", "quiet", "debug",
}  # fmt: skip
_ONLY_COMPARES = {"only", "train", "scope", "layer"}
# What a recipe does not say.
_BESIDE_A_RECIPE = {"recipe", "allow_code", "images", "out", "data_dir", "device", "json", "quiet", "debug"}


def evaluate(
    ctx: typer.Context,
    comparison: Annotated[
        str | None,
        typer.Argument(help="table2: compare every defence of the paper's Table 2 on a data set.", show_default=False),
    ] = None,
    *,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results.json, report.html and finished cells [a comparison has one]."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="TOML file that names all of it, instead of the options below; with table2 rows and scopes."),
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run the Python code that the recipe names (python:FILE:NAME).")
    ] = False,
    dataset: MaybeMeasuredOption = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            help="A trained folder, torchvision:NAME:WEIGHTS or python:... [default: the one that --database names]."
        ),
    ] = None,
    database: Annotated[Path | None, typer.Option(help="Folder of the image database [default: no defence].")] = None,
    images: ImagesOption = None,
    defense: Annotated[
        list[str] | None,
        OneOf("Also measure this defence. Repeat it for several.", defenses.names, python=True),
    ] = None,
    train_set: Annotated[
        list[str] | None,
        typer.Option(
            help="Images that --defense, or with table2 every defence, is made of [with table2 default: the training "
            "split of --dataset, whose test split is then reported].",
        ),
    ] = None,
    only: Annotated[str | None, Commas("With table2: kinds of defences, with commas [default: all].")] = None,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="With table2: also the defences whose nets are to be trained.")
    ] = True,
    scope: Annotated[
        str | None,
        typer.Option(help="With table2: its settings, such as imagenet, the paper's own [default: by --dataset]."),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="With table2: layer of the nearest-neighbour rows [default: calibrated].")
    ] = None,
    rule: RuleOptions,
    rungs: RungOptions,
    headline: Annotated[
        str | None, typer.Option(help="The budget of the table [default: calibrated, else the largest].")
    ] = None,
    sizes: Annotated[bool, typer.Option("--sizes/--no-sizes", help="Also search smaller databases.")] = True,
    limit: LimitOption = None,
    batch_size: BatchOption = 128,
    own: OwnOptions,
    common: Common,
) -> None:
    """Measure the classifier and the defence, clean and attacked, and write results and report.

    Started again with the same --out, it goes on where it was stopped.
    """
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    if comparison is not None:
        if wrong := given - _COMPARES:
            raise InputError(f"{_flags(wrong)} is not for a comparison, whose recipe says it: leave it out")
        if dataset is None:
            raise InputError("give --dataset, such as digits, mnist or cifar10")
        from nndefense.comparison import compare, comparison_from, retrieved_by, summary_of

        values = _values(comparison, recipe, allow_code)
        compared = comparison_from(values, comparison, dataset, seed=common.seed, scope=scope)
        if recipe is not None and classifier is None and compared.scope.net:
            raise InputError(f"the recipe names the net {compared.scope.net}: to open it, give it by --classifier")
        limits = _scope(rungs, {"limit": limit, "batch_size": batch_size, "headline": headline}, given)
        compared = retrieved_by(_rows(compared, words(only), train, limits), layer=layer, **rule.asked())
        place = Path("runs") / f"{comparison}-{dataset.partition(':')[0]}" if out is None else out
        results, files = compare(
            compared,
            dataset,
            place,
            train_sets=train_set or (),
            classifier=classifier,
            surrogate=rungs.surrogate,
            classes=own.classes,
            input_shape=own.shape,
            data_dir=common.data_dir,
            device=common.device,
            say=common.say,
            progress=common.progress,
            command=command_line(),
        )
        common.show(results, f"{summary_of(results)}\n\n{', '.join(map(str, files))}")
        return
    if wrong := given & _ONLY_COMPARES:
        raise InputError(f"{_flags(wrong)} belongs to a comparison: nndefense evaluate table2 ...")
    if out is None:
        raise InputError("give --out, the folder for results and report")
    from nndefense import pipeline
    from nndefense.comparison import material_settings
    from nndefense.database import source_of
    from nndefense.evaluation import Recipe, read_recipe, rungs_for

    if recipe is not None:
        if wrong := given - _BESIDE_A_RECIPE:
            raise InputError(f"--recipe says all of that itself: leave {_flags(wrong)} out")
        chosen = read_recipe(recipe, allow_code=allow_code)
    elif allow_code:
        raise InputError("--allow-code is for the code that a --recipe names; what you name yourself runs without it")
    elif dataset is None or (source := classifier or (source_of(database) if database else None)) is None:
        raise InputError("give --recipe, or --dataset and --classifier (or the --database that names one)")
    elif train_set and not defense:
        raise InputError("--train-set is what other defences are made of: name them by --defense")
    else:
        budgets = rungs.budgets
        models = ["gray", *(["black"] if rungs.surrogate else [])]
        models += ["white", "adaptive"] if rungs.adaptive and (database is not None or defense) else []
        models += ["exact"] if rungs.exact else []
        chosen = Recipe(
            dataset=dataset,
            classifier=source,
            database=str(database) if database is not None else None,
            rungs=rungs_for(models, rungs.settings(budgets), rungs.adaptive_settings),
            defenses=tuple(defense or ()),
            train_set=tuple(train_set or ()),
            materials=material_settings((train_set or [dataset])[0]) if defense else {},
            headline_norm=rungs.norm,
            headline_eps=number("--headline", headline) if headline else pipeline.headline_of(database, budgets),
            surrogate=rungs.surrogate,
            classes=str(own.classes) if own.classes else None,
            input_shape=own.shape,
            limit=limit,
            **rule.asked(),
            sizes=sizes,
            abstain=numbers("--abstain", rungs.abstain) if rungs.abstain else (),
            abstain_on=rungs.abstain_on,
            abstain_steps=rungs.abstain_steps,
            certify=rungs.certify,
            sigma=rungs.sigma,
            draws=rungs.draws,
            audit=rungs.audit,
            gallery=rungs.gallery,
            batch_size=batch_size,
            seed=common.seed,
        )
    results = pipeline.evaluate(
        chosen,
        out,
        data_dir=common.data_dir,
        images=images or (),
        device=common.device,
        progress=common.progress,
        command=command_line(),
        say=common.say,
    )
    show_results(out, results, common)


def _flags(names: set[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))


def show_results(out: Path, results: dict[str, Any], common: Common) -> None:
    """Print the summary of an evaluation and where its files are, or the results as JSON."""
    from nndefense.evaluation import summary

    common.show(results, f"{summary(results)}\nresults: {out / 'results.json'}\nreport:  {out / 'report.html'}")


def _scope(rungs: RungOptions, values: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """What of a comparison's scope the options change; what is not given is the recipe's."""
    values |= {name: getattr(rungs, name) for name in ("norm", "steps", "restarts", "adaptive_steps")}
    scope = {name: value for name, value in values.items() if name in given}
    if "adaptive_steps" in given:
        # Both kinds of attackers who know the defence.
        scope["white_steps"] = rungs.adaptive_steps
    if "eps" in given:
        scope["eps"] = rungs.budgets
    if "headline" in given:
        scope["headline"] = number("--headline", scope["headline"])
    return scope


def _values(name: str, recipe: Path | None, allow_code: bool) -> dict[str, Any]:
    """The values of the comparison's own TOML file, or of the user's."""
    from nndefense.comparison import comparison_values

    shipped = comparison_values(name)
    if recipe is None:
        if allow_code:
            raise InputError("--allow-code is for the code that a --recipe names: leave it out")
        return shipped
    values = read_toml(recipe)
    check_allowed(values, recipe, allow_code=allow_code)
    return values


def _rows(
    recipe: ComparisonRecipe, kinds: Sequence[str] | None, train: bool, scope: Mapping[str, Any]
) -> ComparisonRecipe:
    """The recipe, cut down to some kinds of rows."""
    from nndefense.comparison import changed

    known = defenses.names()
    if unknown := sorted(set(kinds or ()) - set(known)):
        raise InputError(f"--only names {', '.join(unknown)}, but must name some of {', '.join(known)}")
    rows = recipe.rows
    if kinds:
        # The bare net stays: all are compared with it.
        rows = tuple(row for row in rows if row.kind in kinds or row.kind == "none")
    limited = changed(recipe.scope, scope)
    return replace(recipe, rows=rows, scope=limited if train else replace(limited, training={}))
