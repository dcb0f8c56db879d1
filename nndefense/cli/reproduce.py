"""``nndefense reproduce``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nndefense.cli.declare import Commas, OneOf, Only
from nndefense.cli.options import SPEC_HELP, Common, command_line, words
from nndefense.errors import InputError
from nndefense.own_code import check_allowed
from nndefense.recipes import read_toml

if TYPE_CHECKING:
    from nndefense.experiments import ExperimentRecipe

# Each at its standard effort.
_ADDED: dict[str, dict[str, Any]] = {
    name: {"loss": "dlr"} if name == "apgd" else {}
    for name in ("apgd", "apgd-t", "apgd-square", "square", "autoattack")
}


def reproduce(
    *,
    name: Annotated[str | None, typer.Argument(help="A shipped recipe; --list names them.", show_default=False)] = None,
    scale: Annotated[
        str | None,
        OneOf("full: as the papers; small: for two cores [default: full with a GPU, else small].", ("full", "small")),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for everything [default: runs/reproduce/NAME-SCALE].")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds [default: the recipe's].")] = None,
    arch: Annotated[str | None, typer.Option(help="Another architecture than the recipe's.")] = None,
    unlabelled: Annotated[
        str | None,
        typer.Option(
            help="Pool of unlabelled images for self-training; then all others are labelled. " + SPEC_HELP,
        ),
    ] = None,
    attack: Annotated[
        str | None, typer.Option(help="Add an attack to the report: apgd, apgd-t, apgd-square, square or autoattack.")
    ] = None,
    only: Annotated[
        str | None,
        Commas("Only these, each METHOD or METHOD/THREAT, such as robust/linf-8/255 [default: all]."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="TOML file of your own, in the place of a shipped recipe.")
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run the Python code that the recipe names (python:FILE:NAME).")
    ] = False,
    listed: Annotated[bool, typer.Option("--list", help="Only list the recipes.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write table, figure and page again from OUT/results.json.")
    ] = False,
    common: Annotated[Common, Only("data_dir", "device", "json", "quiet", "debug")],
) -> None:
    """Run a published experiment from a recipe: train, attack, write table, figure and page.

    The same command continues a run that was stopped.
    """
    from nndefense import experiments

    if listed:
        _list_recipes(common)
        return
    if name is not None and recipe is not None:
        raise InputError("--recipe takes the place of a shipped recipe: leave its name out")
    if allow_code and recipe is None:
        raise InputError("--allow-code is for the code that a --recipe names: leave it out")
    fitting = scale or _scale(common)
    if recipe is not None:
        name, values = recipe.stem, read_toml(recipe)
        check_allowed(values, recipe, allow_code=allow_code)
        found = experiments.recipe_from(values, name, fitting)
    elif name is not None:
        found = experiments.shipped_recipe(name, fitting)
    else:
        raise InputError(f"name a recipe: {', '.join(experiments.recipe_names())} (--list says more)")
    chosen = changed(found, seeds=seeds, arch=arch, unlabelled=unlabelled, attack=attack, only=words(only) or ())
    folder = Path("runs/reproduce") / f"{name}-{fitting}" if out is None else out
    if report_only:
        results = experiments.read_results(folder / "results.json")
    else:
        images = experiments.open_images(chosen, common.data_dir, unlabelled)
        if scale is None and fitting == "small":
            common.say("there is no GPU here, so the small scale is taken; --scale full has the settings of the papers")
        results = experiments.run(
            chosen,
            images,
            folder,
            device=common.device,
            progress=common.progress,
            command=command_line(),
            say=common.say,
        )
    paths = experiments.write_outputs(results, folder)
    tables = "\n\n".join(f"{table.text()}\n{table.note}".rstrip() for table in experiments.tables_of(results)[:-1])
    files = ", ".join(str(path) for path in (folder / "results.json", *paths))
    common.show(results, f"{tables}\n\n{files}")


# What training and attacks of the small scale took on one core of two: docs/results.
_MINUTES = {
    "does-retrieval-defend": 58,
    "does-retrieval-defend-cifar10": 62,
    "does-retrieval-defend-digits": 32,
    "does-retrieval-defend-rst": 43,
    "fgsm-table": 24,
    "fgsm-table-cifar10": 8,
    "gap-vs-labels": 9,
    "madry-mnist": 42,
    "rst-cifar10": 88,
    "rst-mnist": 48,
    "tsipras-cifar10": 6,
    "tsipras-mnist": 63,
}


def _scale(common: Common) -> str:
    """The scale that fits the device: without a GPU the small one."""
    from nndefense.models import resolve_device

    return "small" if resolve_device(common.device).type == "cpu" else "full"


def _list_recipes(common: Common) -> None:
    """Print every shipped recipe with its data, its number of trainings at each scale, and what they take."""
    from nndefense.experiments import recipe_names, shipped_recipe
    from nndefense.reporting.wording import plural

    rows: list[dict[str, Any]] = []
    for name in recipe_names():
        full, small = (shipped_recipe(name, scale) for scale in ("full", "small"))
        rows.append(
            {
                "name": name,
                "title": full.title,
                "full": _size(full),
                "small": {**_size(small), "minutes": _MINUTES.get(name)},
                "sources": full.sources,
            }
        )
    width = max(len(str(row["name"])) for row in rows)
    lines = []
    for row in rows:
        small = row["small"]
        took = f"{small['minutes']} minutes of one core" if small["minutes"] else "not timed"
        data = f"{plural(small['trainings'], 'net')} on {small['train']}"
        lines += [
            f"{row['name']:<{width}}  {row['title']}",
            f"{'':<{width}}  small: {data}, {took}; full: {row['full']['trainings']} on {row['full']['train']}",
        ]
    lines += [
        "",
        "nndefense reproduce NAME --scale small    on two cores; --scale full needs a GPU, and has not been timed",
    ]
    common.show(rows, "\n".join(lines))


def _size(recipe: ExperimentRecipe) -> dict[str, Any]:
    from nndefense.experiments import runs_of

    return {"trainings": len(runs_of(recipe)), "train": recipe.train, "architecture": recipe.architecture}


def changed(
    recipe: ExperimentRecipe,
    *,
    seeds: int | None = None,
    arch: str | None = None,
    unlabelled: str | None = None,
    attack: str | None = None,
    only: Sequence[str] = (),
) -> ExperimentRecipe:
    """The recipe with what the options change; the results say so.

    Raises:
        InputError: an option that does not fit the recipe.
    """
    from nndefense.experiments.recipe import evaluation_attack

    if only:
        # A quotient has a slash of its own, which names of threats have not.
        parts = (one.partition("/") for one in only)
        named = tuple(f"{method}{slash}{threat.replace('/', 'of')}" for method, slash, threat in parts)
        recipe = replace(recipe, only=named)
    if seeds is not None:
        recipe = replace(recipe, seeds=seeds)
    if arch is not None:
        if any(method.architecture for method in recipe.methods):
            raise InputError(f"the methods of {recipe.name} name their own architectures: leave --arch out")
        recipe = replace(recipe, architecture=arch)
    if unlabelled is not None:
        if not any(method.unlabelled for method in recipe.methods):
            raise InputError(f"the recipe {recipe.name} uses no unlabelled images: leave --unlabelled out")
        recipe = replace(recipe, labels=(0,))
    if attack is not None:
        if attack not in _ADDED:
            raise InputError(f"--attack is {attack}, but must be one of {', '.join(_ADDED)}")
        recipe = replace(recipe, evaluation=(*recipe.evaluation, evaluation_attack(attack, **_ADDED[attack])))
    return recipe
