"""What ``nndefense evaluate table2`` does."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nndefense import pipeline
from nndefense.cli.options import command_line
from nndefense.cli.output import show
from nndefense.comparison import (
    KINDS,
    ComparisonRecipe,
    changed,
    run_comparison,
    shipped_comparison,
    summary_of,
    write_comparison,
)
from nndefense.errors import InputError
from nndefense.models import resolve_device


def compare(
    name: str,
    dataset: str,
    out: Path | None,
    *,
    train_sets: Sequence[str],
    classifier: str | None,
    surrogate: str | None,
    kinds: Sequence[str] | None,
    train: bool,
    scope: Mapping[str, Any],
    classes: Path | None,
    input_shape: tuple[int, int, int] | None,
    data_dir: Path | None,
    device: str,
    seed: int,
    as_json: bool,
    progress: bool,
) -> None:
    """Run a shipped comparison and write its files.

    Args:
        name: of the recipe.
        dataset: a set with splits of its own, or, with ``train_sets``, the images to report on.
        out: folder for everything; None for ``runs/NAME-DATASET``.
        train_sets: the images that fill databases and train nets; none for the training split of ``dataset``.
        classifier, surrogate: sources of ready nets; without them nets are trained.
        kinds: of the rows to run, or None for all.
        train: whether rows that need a training are run.
        scope: entries of the recipe's scope that differ.
        classes, input_shape: of classifiers of one's own.
        data_dir, device, seed, as_json, progress: as everywhere.

    Raises:
        InputError: options that do not go together.
    """
    recipe = _recipe(name, dataset, kinds, train, scope, seed)
    sources = list(train_sets) or [dataset]
    reported = dataset if train_sets else pipeline.reported_split(dataset, "give the others by --train-set")
    target = resolve_device(device)

    def opened(source: str | None) -> Any:
        if source is None:
            return None
        return pipeline.open_classifier(
            source, device=device, data_dir=data_dir, classes=classes, input_shape=input_shape, specs=sources
        )

    model, other = opened(classifier), opened(surrogate)
    if model is not None:
        pipeline.check_surrogate(other, model)
    images = pipeline.open_datasets(sources, data_dir=data_dir, like=model)
    test = pipeline.open_datasets([reported], data_dir=data_dir, like=model)
    pipeline.check_disjoint(test, images)
    test = pipeline.drawn(test, recipe.scope.limit, seed)
    folder = Path("runs") / f"{name}-{dataset.partition(':')[0]}" if out is None else out.expanduser()
    materials = pipeline.Materials(
        recipe.scope,
        images,
        folder,
        target,
        seed,
        given=model,
        given_surrogate=other,
        specs=tuple(sources),
        say=lambda text: print(text, file=sys.stderr, flush=True) if progress else None,
        progress=progress,
    )
    results = run_comparison(recipe, materials, test, command_line())
    paths = ", ".join(str(path) for path in (folder / "results.json", *write_comparison(results, folder)))
    show(results, f"{summary_of(results)}\n\n{paths}", as_json)


def _recipe(
    name: str, dataset: str, kinds: Sequence[str] | None, train: bool, scope: Mapping[str, Any], seed: int
) -> ComparisonRecipe:
    recipe = shipped_comparison(name, dataset, seed=seed)
    if unknown := sorted(set(kinds or ()) - set(KINDS)):
        raise InputError(f"--only names {', '.join(unknown)}, but must name some of {', '.join(KINDS)}")
    rows = recipe.rows
    if kinds:
        # The bare net stays: all are compared with it.
        rows = tuple(row for row in rows if row.kind in kinds or row.kind == "none")
    limited = changed(recipe.scope, scope)
    return replace(recipe, rows=rows, scope=limited if train else replace(limited, training={}))
