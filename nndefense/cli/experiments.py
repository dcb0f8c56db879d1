"""What ``nndefense reproduce`` does."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from nndefense.cli.options import command_line
from nndefense.cli.output import show
from nndefense.errors import InputError
from nndefense.experiments import (
    Recipe,
    open_images,
    read_results,
    recipe_names,
    run,
    runs_of,
    shipped_recipe,
    tables_of,
    write_outputs,
)
from nndefense.experiments.recipe import evaluation_attack

_OUT = Path("runs/reproduce")
# What stands in for a number of steps where an attack counts otherwise.
_ADDED: dict[str, dict[str, Any]] = {
    "apgd": {"steps": 100, "loss": "dlr"},
    "apgd-t": {"steps": 100},
    "square": {"steps": 5000},
    "autoattack": {"steps": 100},
}


def list_recipes(*, as_json: bool) -> None:
    """Print every shipped recipe with its number of trainings at each scale."""
    rows = []
    for name in recipe_names():
        full, small = (shipped_recipe(name, scale) for scale in ("full", "small"))
        rows.append(
            {"name": name, "title": full.title, "full": _size(full), "small": _size(small), "sources": full.sources}
        )
    width = max(len(str(row["name"])) for row in rows)
    lines = [f"{row['name']:<{width}}  {row['title']}" for row in rows]
    lines += ["", "nndefense reproduce NAME --scale small    on two cores; --scale full needs a GPU"]
    show(rows, "\n".join(lines), as_json)


def _size(recipe: Recipe) -> dict[str, Any]:
    return {"trainings": len(runs_of(recipe)), "train": recipe.train, "architecture": recipe.architecture}


def reproduce(
    name: str | None,
    scale: str,
    out: Path | None,
    *,
    seeds: int | None,
    arch: str | None,
    unlabelled: str | None,
    attack: str | None,
    device: str,
    data_dir: Path | None,
    report_only: bool,
    as_json: bool,
    progress: bool,
) -> None:
    """Run a shipped recipe and write its files, or write them again from the results."""
    if name is None:
        raise InputError(f"name a recipe: {', '.join(recipe_names())} (--list says more)")
    recipe = changed(shipped_recipe(name, scale), seeds=seeds, arch=arch, unlabelled=unlabelled, attack=attack)
    folder = _OUT / f"{name}-{scale}" if out is None else out.expanduser()
    if report_only:
        results = read_results(folder / "results.json")
    else:
        results = run(
            recipe,
            open_images(recipe, data_dir, unlabelled),
            folder,
            device=device,
            progress=progress,
            command=command_line(),
            say=lambda text: print(text, file=sys.stderr, flush=True) if progress else None,
        )
    paths = write_outputs(results, folder)
    tables = "\n\n".join(f"{table.text()}\n{table.note}".rstrip() for table in tables_of(results)[:-1])
    files = ", ".join(str(path) for path in (folder / "results.json", *paths))
    show(results, f"{tables}\n\n{files}", as_json)


def changed(
    recipe: Recipe,
    *,
    seeds: int | None = None,
    arch: str | None = None,
    unlabelled: str | None = None,
    attack: str | None = None,
) -> Recipe:
    """The recipe with what the options change; the results say so.

    Raises:
        InputError: an option that does not fit the recipe.
    """
    if seeds is not None:
        recipe = replace(recipe, seeds=seeds)
    if arch is not None:
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
