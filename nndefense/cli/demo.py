"""The whole path in one command: train, calibrate, build the database, attack, defend, report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index_build import build_databases
from nndefense.cli import inputs, workflow
from nndefense.database import ImageDatabase
from nndefense.datasets import ImageDataset, holdout
from nndefense.defenses import NearestNeighborDefense
from nndefense.evaluation import AttackSettings, Evaluated, Recipe, calibration_text, layer_subject, rungs_for
from nndefense.features import FeatureSpec
from nndefense.files import make_folder
from nndefense.guard import Guard
from nndefense.guard.percentile import FILE as GUARD_FILE
from nndefense.models import Classifier, build_classifier
from nndefense.training import train_classifier


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
        layers: candidate layers, or None for six that are spread over the net.
        candidate_rows: how many database images, drawn at random, the candidates are compared on.
        limit: how many test images, drawn at random, or None for all.
        adaptive: the adaptive attack; None for neither that nor the white box.
    """

    database_sets: Sequence[str]
    test: str
    out: Path
    attack: AttackSettings
    headline_eps: float
    adaptive: AttackSettings | None = None
    audit: bool = True
    calibration: str | None = None
    holdout: int = 300
    classifier: str | None = None
    surrogate: str | None = None
    arch: str = "small-cnn"
    surrogate_arch: str = "madry-mnist"
    classes: Path | None = None
    input_shape: tuple[int, int, int] | None = None
    layers: Sequence[str] | None = None
    poolings: Sequence[str] = workflow.POOLINGS
    ks: Sequence[int] = (1, 3, 5, 10, 20, 50)
    weightings: Sequence[str] = ("uniform", "cbw-e", "cbw-d")
    pca: int = 256
    max_clean_loss: float = 0.02
    candidate_rows: int = 20_000
    epochs: int | None = None
    limit: int | None = None
    batch_size: int = 128
    gallery: int = 10
    data_dir: Path | None = None
    device: str = "auto"
    seed: int = 0
    command: str = "nndefense demo"
    progress: bool = True


def run_demo(settings: DemoSettings, say: Callable[[str], None]) -> tuple[dict[str, Any], Evaluated]:
    """Run all steps, writing ``classifier/``, ``surrogate/`` and ``database/`` under ``out``.

    Returns:
        The results, as for ``results.json``, and the records and gallery for the report.
    """
    s = settings
    # What can be found wrong before the hours of work is found before them.
    recipe = _recipe(s)
    model = _load(s, s.classifier) if s.classifier else None
    surrogate = _load(s, s.surrogate) if s.surrogate else None
    rows, rest, held = inputs.split(
        s.database_sets, s.calibration, s.holdout, data_dir=s.data_dir, like=model, seed=s.seed
    )
    test = inputs.open_datasets([s.test], data_dir=s.data_dir, like=model)
    inputs.check_disjoint(test, rows)
    inputs.check_disjoint(test, held)
    rows, guarded = _for_the_guard(s, rows, held)
    test = test if s.limit is None else inputs.drawn(test, s.limit, s.seed)
    make_folder(s.out)
    say(f"data: {len(rows):,} database images, {len(held):,} to calibrate on, {len(test):,} to report on")

    if model is None:
        say(f"training the classifier ({s.arch})")
        model = _train(s, s.arch, rest, "classifier", s.seed)
    if surrogate is None:
        say(f"training the surrogate ({s.surrogate_arch})")
        surrogate = _train(s, s.surrogate_arch, rest, "surrogate", s.seed + 1)
    inputs.check_surrogate(surrogate, model)

    features = workflow.candidate_features(model, s.layers, s.poolings, s.pca)
    candidates = inputs.drawn(rest, s.candidate_rows, s.seed)
    say(f"calibrating: {len(features)} layers and poolings, {len(candidates):,} candidate rows")
    calibration = workflow.calibrate_on(
        model,
        candidates,
        held,
        features,
        s.attack,
        s.headline_eps,
        ks=s.ks,
        weightings=s.weightings,
        max_clean_loss=s.max_clean_loss,
        batch_size=s.batch_size,
        seed=s.seed + 1,
        progress=s.progress,
    )
    say(calibration_text(calibration))

    chosen = calibration["chosen"]
    feature = FeatureSpec(chosen["layer"], chosen["pooling"], pca=s.pca)
    # The last map, averaged: what one would take without calibrating.
    deep = FeatureSpec(features[-1].layer, "avg", pca=s.pca)
    say(f"building the database: {len(rows):,} rows of {feature}")
    with tempfile.TemporaryDirectory(prefix="nndefense-") as folder:
        places = {s.out / "database": feature} | ({Path(folder) / "deep": deep} if deep != feature else {})
        databases = build_databases(
            rows,
            model,
            places,
            specs=list(s.database_sets),
            batch_size=s.batch_size,
            seed=s.seed,
            overwrite=True,
            progress=s.progress,
        )
        inputs.store_calibration(s.out / "database", calibration)
        _calibrate_guard(s, model, databases[0], chosen, guarded, say)
        defense = NearestNeighborDefense(model, databases[0], chosen["k"], chosen["weighting"])
        others = [
            layer_subject(NearestNeighborDefense(model, database, chosen["k"], chosen["weighting"]))
            for database in databases[1:]
        ]
        say("attacking and evaluating")
        found = workflow.evaluated(
            recipe, test, model, defense, surrogate, s.out, others=others, pictures=rows, progress=s.progress
        )
    return workflow.results_of(found, recipe, test, model, defense, surrogate, calibration, s.command), found


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
    chosen: dict[str, Any],
    guarded: ImageDataset | None,
    say: Callable[[str], None],
) -> None:
    if guarded is not None:
        say(f"calibrating the guard: {len(guarded):,} images that stand in no database")
        guard = Guard(model, database, chosen["k"], chosen["weighting"])
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


def _load(s: DemoSettings, source: str) -> Classifier:
    return inputs.open_classifier(
        source,
        device=s.device,
        data_dir=s.data_dir,
        classes=s.classes,
        input_shape=s.input_shape,
        specs=s.database_sets,
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
