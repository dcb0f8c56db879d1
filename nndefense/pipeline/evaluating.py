"""Measuring what a recipe names: opened, checked, attacked, and written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nndefense import recipes
from nndefense.bars import progress_bar
from nndefense.datasets import ImageDataset, measured_spec
from nndefense.defenses import NearestNeighborDefense
from nndefense.defenses.stored import open_stored, stored_calibration
from nndefense.errors import InputError
from nndefense.evaluation import Recipe, Subject, assemble, run, write_report
from nndefense.evaluation.abstention import check_rates
from nndefense.evaluation.audit_runs import NOISE_DRAWS
from nndefense.evaluation.ladder import BARE, DEFENDED
from nndefense.files import write_json
from nndefense.locks import writes
from nndefense.models import Classifier
from nndefense.pipeline import defenses
from nndefense.pipeline.checks import (
    check_disjoint,
    check_not_calibrated_on,
    check_not_in_database,
    check_surrogate,
)
from nndefense.pipeline.making import make_defense, subject_of, with_known_seed
from nndefense.pipeline.materials import Materials, MaterialSettings
from nndefense.pipeline.opening import drawn, held_out, neighbor_pictures, open_classifier, open_datasets

# Folders in that of an evaluation: finished cells, and what its defences are made of.
HOLDS = ("cells", "made")


@dataclass(frozen=True)
class Opened:
    """What a recipe names, opened and checked.

    Attributes:
        dataset: the images to report on, cut to the recipe's limit.
        classifier: that is defended.
        defense: over the recipe's database, or None.
        surrogate: of the black-box attacker, or None.
        calibration: what the defence's setting was chosen from, or None.
        pictures: the images of the database, where they are at hand.
        others: more defences to compare.
        held: clean images for the thresholds of abstaining, where the recipe asks for that.
    """

    dataset: ImageDataset
    classifier: Classifier
    defense: NearestNeighborDefense | None = None
    surrogate: Classifier | None = None
    calibration: dict[str, Any] | None = None
    pictures: ImageDataset | None = None
    others: Sequence[Subject] = ()
    held: ImageDataset | None = None


@writes("out", holds=HOLDS, lend=True)
def evaluate(
    recipe: Recipe,
    out: str | Path,
    *,
    data_dir: Path | None = None,
    images: Sequence[str] = (),
    device: str = "auto",
    progress: bool = True,
    command: str = "",
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Evaluate what a recipe names: clean accuracy, and accuracy under each of its attacks.

    Of a data set whose split is not named the test split is taken, else the validation split. Images that stand in the
    database, or that its setting was calibrated on, are refused.

    Args:
        recipe: names of all that is needed.
        out: folder for ``results.json``, ``report.html``, and what is not made again: finished cells, and in ``made``
            the nets and databases of defences.
        data_dir: the folder of the data sets.
        images: specs of the images that the database was built from, to show neighbours and to start attacks from.
            None: as :func:`~nndefense.pipeline.opening.neighbor_pictures` finds them.
        device: where the nets run.
        progress: whether to show a bar.
        command: recorded.
        say: called with a line for people before everything that takes long.

    Returns:
        The results, as in ``results.json``.

    Raises:
        NNDefenseError: something cannot be opened, or does not fit together.
    """
    recipe = replace(recipe, dataset=measured_spec(recipe.dataset, data_dir=data_dir))
    opened = open_recipe(
        recipe,
        Path(out).expanduser(),
        data_dir=data_dir,
        images=images,
        device=device,
        progress=progress,
        say=say,
    )
    if recipe.audit:
        say(
            f"the self-audit comes last: the strongest attack again, longer and in other ways, on up to "
            f"{min(recipe.audit_images, len(opened.dataset)):,} images, some six times its cost on them, and "
            f"{NOISE_DRAWS:,} draws of noise; --no-audit (audit=False) leaves it out"
        )
    return measure(recipe, opened, Path(out).expanduser(), progress=progress, command=command)


def open_recipe(
    recipe: Recipe,
    out: Path,
    *,
    data_dir: Path | None = None,
    images: Sequence[str] = (),
    device: str = "auto",
    progress: bool = True,
    say: Callable[[str], object] = lambda text: None,
) -> Opened:
    """Open what a recipe names, make its defences, and check that all fits together; arguments and errors as for
    :func:`evaluate`.
    """
    shared = {"norm": recipe.headline_norm, "headline": recipe.headline_eps, "batch_size": recipe.batch_size}
    scope = recipes.build(MaterialSettings, {**shared, **recipe.materials}, "materials")
    folder = Path(recipe.database).expanduser() if recipe.database else None
    wanted = [defenses.get(name) for name in recipe.defenses if name != BARE]
    for defense in wanted:
        if recipe.defenses.count(defense.name) > 1:
            raise InputError(f"the defence {defense.name} is named twice: name it once")
        if defense.images and not recipe.train_set:
            raise InputError(f"the defence {defense.name} is made of training images: name them by --train-set")
        if defense.name == DEFENDED and folder is not None:
            raise InputError(f"the database is that of {DEFENDED} already: leave out one of the two")

    def load(source: str) -> Classifier:
        return open_classifier(
            source,
            device=device,
            data_dir=data_dir,
            classes=Path(recipe.classes).expanduser() if recipe.classes else None,
            input_shape=recipe.input_shape,
            specs=(recipe.dataset,),
            database=folder,
            say=say,
        )

    classifier = load(recipe.classifier)
    surrogate = load(recipe.surrogate) if recipe.surrogate else None
    dataset = open_datasets([recipe.dataset], data_dir=data_dir, like=classifier)
    check_surrogate(surrogate, classifier)
    opened = Opened(drawn(dataset, recipe.limit, recipe.seed).usable, classifier, surrogate=surrogate)
    if folder is not None:
        stored = open_stored(folder, classifier, **recipe.rule)
        ours = NearestNeighborDefense(classifier, stored.database, **stored.rule.to_json())
        named = (recipe.dataset, *recipe.train_set)
        pictures = neighbor_pictures(stored.database, data_dir, classifier, images, named, say)
        check_not_in_database(dataset, ours, pictures)
        # Also where the rule is given: layer and pooling were chosen on these images, too.
        check_not_calibrated_on(dataset, stored_calibration(folder), folder)
        opened = replace(opened, defense=ours, calibration=stored.calibration, pictures=pictures)
    if not wanted:
        return _with_held(opened, recipe, data_dir)
    train = open_datasets(recipe.train_set, data_dir=data_dir, like=classifier) if recipe.train_set else None
    if train is not None:
        check_disjoint(dataset, train)
    materials = Materials(
        scope,
        train,
        out / "made",
        classifier.device,
        recipe.seed,
        given=classifier,
        specs=recipe.train_set,
        say=say,
        progress=progress,
    )
    return _with_held(_with_defenses(opened, wanted, materials, recipe), recipe, data_dir)


def _with_held(opened: Opened, recipe: Recipe, data_dir: Path | None) -> Opened:
    """With the images that thresholds of abstaining are set on, where the recipe asks for that."""
    if not recipe.abstain:
        return opened
    held = held_out(
        opened.dataset,
        opened.defense,
        opened.classifier,
        recipe.abstain_on,
        calibrated_on=(opened.calibration or {}).get("ids", ()),
        named=(recipe.dataset, *recipe.train_set),
        data_dir=data_dir,
        seed=recipe.seed,
    )
    check_rates(recipe.abstain, len(held))
    return replace(opened, held=held)


def _with_defenses(opened: Opened, wanted: Sequence[defenses.Defense], materials: Materials, recipe: Recipe) -> Opened:
    """Make the defences; a nearest-neighbour defence takes the place of the one over a database."""
    models = {rung.threat_model for rung in recipe.rungs}
    asked = recipe.rule
    others = []
    for defense in wanted:
        made = make_defense(defense, materials, asked if defense.name == DEFENDED else None)
        if isinstance(made.model, NearestNeighborDefense) and defense.name == DEFENDED:
            opened = replace(
                opened,
                defense=made.model,
                calibration=None if asked else materials.chosen(made.facts["pooling"]).calibration,
                pictures=materials.rows,
            )
            continue
        name = defenses.defense_name(defense.name)
        for one, called in ((made, name), (with_known_seed(made, recipe.seed), f"{name}, seed known")):
            if one is not None:
                informed = bool(models & {"white", "adaptive"})
                others.append(subject_of(one, called, "defense", materials, informed=informed))
    return replace(opened, others=others)


@writes("out", holds=HOLDS)
def measure(recipe: Recipe, opened: Opened, out: Path, *, progress: bool = True, command: str = "") -> dict[str, Any]:
    """Run a recipe on what was opened for it, and write ``results.json`` and ``report.html``.

    Arguments, result and errors are those of :func:`evaluate`, which opens and checks, too.
    """
    with progress_bar(desc="evaluating", unit=" images", shown=progress) as bar:

        def step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = run(
            recipe,
            opened.dataset,
            opened.classifier,
            opened.defense,
            opened.surrogate,
            others=opened.others,
            pictures=opened.pictures,
            held=opened.held,
            cells=out / "cells",
            progress=step,
        )
    calibration = opened.calibration
    results = assemble(
        found.records,
        recipe=recipe,
        dataset=opened.dataset,
        classifier=opened.classifier,
        surrogate=opened.surrogate,
        defense=opened.defense,
        # The ids serve to keep these images out of the test set; a reader of the results needs their number.
        calibration={k: v for k, v in calibration.items() if k != "ids"} if calibration else None,
        audit=found.audit,
        command=command,
        abstention=found.abstention,
    )
    write_json(out / "results.json", results)
    write_report(results, found.gallery, out / "report.html")
    return results


def headline_of(database: Path | None, budgets: Sequence[float]) -> float:
    """The budget to tabulate where none is named: the calibrated one where it is run, else the largest.

    Args:
        database: the folder whose calibration counts, or None.
        budgets: those that are run, at least one, in units of the norm.
    """
    calibration = stored_calibration(database) if database is not None else None
    calibrated = float(calibration["attack"]["eps"][0]) if calibration else None
    return calibrated if calibrated is not None and calibrated in budgets else max(budgets)
