"""A comparison from the names of its images and nets: opened, checked, run, and written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nndefense import pipeline
from nndefense.comparison.recipe import ComparisonRecipe
from nndefense.comparison.report import write_comparison
from nndefense.comparison.runner import run_comparison
from nndefense.models import Classifier, resolve_device


def compare(
    recipe: ComparisonRecipe,
    dataset: str,
    out: Path,
    *,
    train_sets: Sequence[str] = (),
    classifier: str | None = None,
    surrogate: str | None = None,
    classes: Path | None = None,
    input_shape: tuple[int, int, int] | None = None,
    data_dir: Path | None = None,
    device: str = "auto",
    say: Callable[[str], object] = lambda text: None,
    progress: bool = True,
    command: str = "",
) -> tuple[dict[str, Any], list[Path]]:
    """Run a comparison and write its files.

    Args:
        recipe: what is compared, and how.
        dataset: a set with splits of its own, or, with ``train_sets``, the images to report on.
        out: folder for everything; what is finished in it is not made again.
        train_sets: the images that fill databases and train nets; none for the training split of ``dataset``.
        classifier, surrogate: sources of ready nets; without them nets are trained.
        classes, input_shape: of classifiers of one's own.
        data_dir: the folder of the data sets.
        device: where to compute.
        say: called with a line for people before everything that takes long.
        progress: whether to show bars.
        command: recorded.

    Returns:
        The results, and the files that hold them: ``results.json``, table, figure and page.

    Raises:
        NNDefenseError: something cannot be opened, or does not fit together.
    """
    sources = list(train_sets) or [dataset]
    reported = dataset if train_sets else pipeline.reported_split(dataset, "give the others by --train-set")
    target = resolve_device(device)

    def opened(source: str | None) -> Classifier | None:
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
    materials = pipeline.Materials(
        recipe.scope,
        images,
        out,
        target,
        recipe.seed,
        given=model,
        given_surrogate=other,
        specs=tuple(sources),
        say=say,
        progress=progress,
    )
    results = run_comparison(recipe, materials, pipeline.drawn(test, recipe.scope.limit, recipe.seed), command)
    return results, [out / "results.json", *write_comparison(results, out)]
