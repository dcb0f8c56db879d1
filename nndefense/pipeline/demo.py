"""The whole path in one command: train, calibrate, build the database, attack, defend, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from index_build import build_databases
from nndefense.attacks.retrieval import check_exact
from nndefense.database import ImageDatabase
from nndefense.datasets import ImageDataset, holdout, measured_spec
from nndefense.defenses import NearestNeighborDefense
from nndefense.errors import InputError
from nndefense.evaluation import AttackSettings, Recipe, Rung, calibration_text, layer_subject, rungs_for
from nndefense.features import FeatureSpec
from nndefense.guard import Guard
from nndefense.guard.percentile import FILE as GUARD_FILE
from nndefense.locks import locked, passing_folder, writes
from nndefense.models import Classifier, build_classifier
from nndefense.pipeline.calibrating import Candidates, Chosen, choose
from nndefense.pipeline.checks import check_disjoint, check_surrogate
from nndefense.pipeline.evaluating import HOLDS, Opened, measure
from nndefense.pipeline.opening import drawn, open_classifier, open_datasets, split, training_shape
from nndefense.training import train_classifier

# The sets of neighbours that a proof goes through grow with K.
_PROVABLE_K = 5


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs on.

    Attributes:
        database_sets: specs of the images that fill the database (and train the nets, where they are trained).
        test: spec of the images that are reported.
        calibration: spec of the images to calibrate on, or None to hold ``holdout`` images out of the first.
        holdout: how many; they train nothing and stand in no candidate database. In the final one stand all but half of
            them: on that half the guard is calibrated. (Of a set of their own all serve for that.)
        classifier: source of a ready classifier, or None to train ``arch``.
        surrogate: source of a ready surrogate, or None to train ``surrogate_arch`` under another seed.
        arch, surrogate_arch: architectures for the nets that are trained.
        classes: file of class names for classifiers of one's own, or None.
        input_shape: C, H, W for classifiers that do not say it, or None for that of the images.
        size: height and width of the images where nets are trained, or None as for
            :func:`~nndefense.pipeline.training_shape`.
        candidates: the settings that are compared, by default under the gray-box attack alone. The best one is built
            even where it is no better than the bare classifier, and the report says so.
        limit: how many test images, drawn at random, or None for all.
        adaptive: the adaptive attack; None for neither that nor the white box.
        exact: whether the exact accuracy is found, where the chosen feature is affine in the pixels.
    """

    database_sets: Sequence[str]
    test: str
    out: Path
    attack: AttackSettings
    headline_eps: float
    adaptive: AttackSettings | None = None
    exact: bool = False
    audit: bool = True
    calibration: str | None = None
    holdout: int | None = None
    classifier: str | None = None
    surrogate: str | None = None
    arch: str = "small-cnn"
    surrogate_arch: str = "madry-mnist"
    classes: Path | None = None
    input_shape: tuple[int, int, int] | None = None
    size: tuple[int, int] | None = None
    candidates: Candidates = field(default_factory=lambda: Candidates(objective="gray"))
    epochs: int | None = None
    limit: int | None = None
    batch_size: int = 128
    gallery: int = 10
    data_dir: Path | None = None
    device: str = "auto"
    seed: int = 0
    command: str = "nndefense demo"
    progress: bool = True


@writes("settings.out", holds=HOLDS, lend=True)
def run_demo(settings: DemoSettings, say: Callable[[str], object] = lambda text: None) -> dict[str, Any]:
    """Run all steps, writing ``classifier/``, ``surrogate/``, ``database/``, results and report under ``out``.

    Args:
        settings: what it runs on.
        say: called with a line for people before every step.

    Returns:
        The results, as in ``results.json``.

    Raises:
        NNDefenseError: something cannot be opened or does not fit together, or no setting of the defence helps.
    """
    s = settings
    # What can be found wrong before the hours of work is found before them.
    recipe = _recipe(s)
    model = _load(s, s.classifier, say) if s.classifier else None
    surrogate = _load(s, s.surrogate, say) if s.surrogate else None
    if model is not None and s.size is not None:
        raise InputError("the size of the images is that of the classifier: leave --size out")
    like = model or training_shape(s.database_sets, s.arch, s.size, data_dir=s.data_dir, say=say)
    lowered: list[str] = []
    rows, rest, held = split(
        s.database_sets, s.calibration, s.holdout, data_dir=s.data_dir, like=like, seed=s.seed, say=lowered.append
    )
    test = open_datasets([measured_spec(s.test, data_dir=s.data_dir)], data_dir=s.data_dir, like=like)
    check_disjoint(test, rows)
    check_disjoint(test, held)
    rows, guarded = _for_the_guard(s, rows, held)
    test = drawn(test, s.limit, s.seed).usable
    for line in lowered:
        say(line)
    say(f"data: {len(rows):,} database images, {len(held):,} to calibrate on, {len(test):,} to report on")

    if model is None:
        say(f"training the classifier ({s.arch})")
        model = _train(s, s.arch, rest, "classifier", s.seed)
    if surrogate is None:
        say(f"training the surrogate ({s.surrogate_arch})")
        surrogate = _train(s, s.surrogate_arch, rest, "surrogate", s.seed + 1)
    check_surrogate(surrogate, model)

    options: dict[str, Any] = {"batch_size": s.batch_size, "seed": s.seed, "progress": s.progress}
    tried, drawn_rows = len(s.candidates.features(model)), min(s.candidates.rows, len(rest))
    say(f"calibrating: {tried} layers and poolings, {drawn_rows:,} candidate rows")
    chosen = choose(model, rest, held, s.attack, s.headline_eps, s.candidates, beside=s.out, say=say, **options)
    say(calibration_text(chosen.calibration))

    # The last map, averaged: what one would take without calibrating.
    deep = FeatureSpec(chosen.features[-1].layer, "avg", pca=chosen.feature.pca)
    say(f"building the database: {len(rows):,} rows of {chosen.feature}")
    place = s.out / "database"
    with passing_folder(s.out) as folder, locked(place, lend=True):
        places = {place: chosen.feature}
        if deep != chosen.feature:
            places[folder / "deep"] = deep
        kept = {place: chosen.calibration}
        databases = build_databases(
            rows, model, places, specs=list(s.database_sets), overwrite=True, calibrations=kept, **options
        )
        _calibrate_guard(s, model, databases[0], chosen, guarded, say)
        defense, *others = (NearestNeighborDefense(model, built, **chosen.rule.to_json()) for built in databases)
        if s.exact:
            recipe = _with_exact(recipe, s, defense, test, say)
        say("attacking and evaluating")
        opened = Opened(
            test, model, defense, surrogate, chosen.calibration, rows, [layer_subject(other) for other in others]
        )
        return measure(recipe, opened, s.out, progress=s.progress, command=s.command)


def _for_the_guard(s: DemoSettings, rows: ImageDataset, held: ImageDataset) -> tuple[ImageDataset, ImageDataset | None]:
    """The images of the final database, and those that the guard is calibrated on: none of them stand in it."""
    if s.calibration is not None:
        return rows, held
    if len(held) < 2:
        return rows, None
    guarded = held.subset(holdout(held, len(held) // 2, s.seed)[1])
    apart = set(guarded.ids)
    return rows.subset([place for place, item in enumerate(rows.ids) if item not in apart]), guarded


def _calibrate_guard(
    s: DemoSettings,
    model: Classifier,
    database: ImageDatabase,
    chosen: Chosen,
    guarded: ImageDataset | None,
    say: Callable[[str], object],
) -> None:
    if guarded is not None:
        say(f"calibrating the guard: {len(guarded):,} images that stand in no database")
        guard = Guard(model, database, **chosen.rule.to_json())
        specs = [s.calibration] if s.calibration is not None else list(s.database_sets[:1])
        guard.calibrate(guarded, specs=specs, batch_size=s.batch_size).write(database.path / GUARD_FILE)


def _recipe(s: DemoSettings) -> Recipe:
    informed = ("white", "adaptive") if s.adaptive is not None else ()
    return Recipe(
        dataset=s.test,
        classifier=s.classifier or str(s.out / "classifier"),
        surrogate=s.surrogate or str(s.out / "surrogate"),
        database=str(s.out / "database"),
        rungs=rungs_for(("gray", "black", *informed), s.attack, s.adaptive),
        headline_norm=s.attack.norm,
        headline_eps=s.headline_eps,
        classes=str(s.classes) if s.classes else None,
        input_shape=s.input_shape,
        limit=s.limit,
        audit=s.audit,
        gallery=s.gallery,
        batch_size=s.batch_size,
        seed=s.seed,
    )


def _with_exact(
    recipe: Recipe, s: DemoSettings, defense: NearestNeighborDefense, test: ImageDataset, say: Callable[[str], object]
) -> Recipe:
    """The recipe with the exact accuracy, where the setting that was chosen has one that minutes are enough for."""
    if defense.k > _PROVABLE_K:
        say(f"nothing is proven: with K = {defense.k} that takes long, and nndefense evaluate --exact does it")
        return recipe
    try:
        check_exact(defense.surface(), test.batch(range(min(len(test), 8)))[0].to(defense.classifier.device))
    except InputError as error:
        say(f"nothing is proven: {str(error).rpartition(': ')[0]}")
        return recipe
    return replace(recipe, rungs=(*recipe.rungs, Rung("exact", AttackSettings("exact", s.attack.norm, s.attack.eps))))


def _load(s: DemoSettings, source: str, say: Callable[[str], object]) -> Classifier:
    return open_classifier(
        source,
        device=s.device,
        data_dir=s.data_dir,
        classes=s.classes,
        input_shape=s.input_shape,
        specs=s.database_sets,
        say=say,
    )


def _train(s: DemoSettings, arch: str, images: ImageDataset, folder: str, seed: int) -> Classifier:
    net = build_classifier(arch, input_shape=images.shape, classes=images.classes, seed=seed)
    return train_classifier(
        net,
        images,
        epochs=s.epochs,
        seed=seed,
        device=s.device,
        out=s.out / folder,
        overwrite=True,
        progress=s.progress,
    )
