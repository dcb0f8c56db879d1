"""What the subcommands do, each as one function of plain values."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from index_build import build_database
from nndefense.cli import inputs, output, workflow
from nndefense.cli.demo import DemoSettings, run_demo
from nndefense.database import WEIGHTINGS, check_vacant
from nndefense.datasets import image_channels, write_hdf5
from nndefense.errors import DataError, InputError
from nndefense.evaluation import AttackSettings, Recipe, calibration_text, run_attack, wilson_interval
from nndefense.features import FeatureSpec
from nndefense.files import make_folder
from nndefense.guard import Guard


def calibrate(
    specs: Sequence[str],
    source: str,
    out: Path,
    attack: AttackSettings,
    *,
    calibration: str | None,
    n_holdout: int,
    layers: Sequence[str] | None,
    poolings: Sequence[str],
    ks: Sequence[int],
    pca: int,
    max_clean_loss: float,
    candidate_rows: int,
    overwrite: bool,
    batch_size: int,
    classes: Path | None,
    input_shape: tuple[int, int, int] | None,
    data_dir: Path | None,
    device: str,
    seed: int,
    as_json: bool,
    progress: bool,
) -> None:
    """Choose a setting on held-out images, print the table, and build the database of all images with it."""
    classifier = inputs.open_classifier(
        source, device=device, data_dir=data_dir, classes=classes, input_shape=input_shape, specs=specs
    )
    rows, rest, held = inputs.split(specs, calibration, n_holdout, data_dir=data_dir, like=classifier, seed=seed)
    # A folder that cannot be used is told before the work, not after it.
    make_folder(out)
    check_vacant(out, overwrite=overwrite)
    found = workflow.calibrate_on(
        classifier,
        inputs.drawn(rest, candidate_rows, seed),
        held,
        workflow.candidate_features(classifier, layers, poolings, pca),
        attack,
        attack.eps[0],
        ks=ks,
        weightings=WEIGHTINGS,
        max_clean_loss=max_clean_loss,
        batch_size=batch_size,
        seed=seed + 1,
        progress=progress,
    )
    chosen = found["chosen"]
    feature = FeatureSpec(chosen["layer"], chosen["pooling"], pca=pca)
    database = build_database(
        rows,
        classifier,
        feature,
        out,
        specs=specs,
        batch_size=batch_size,
        seed=seed,
        overwrite=overwrite,
        progress=progress,
    )
    inputs.store_calibration(out, found)
    output.show(
        {"database": str(out), "rows": len(database), "calibration": found},
        f"{calibration_text(found)}\nbuilt {out}: {len(database):,} rows of {feature}",
        as_json,
    )


def attack(
    spec: str,
    source: str,
    out: Path,
    settings: AttackSettings,
    *,
    limit: int | None,
    overwrite: bool,
    batch_size: int,
    classes: Path | None,
    input_shape: tuple[int, int, int] | None,
    data_dir: Path | None,
    device: str,
    seed: int,
    as_json: bool,
    progress: bool,
) -> None:
    """Attack a data set's images and keep them as float32, with the ids of their originals."""
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists: choose another file, or --overwrite")
    classifier = inputs.open_classifier(
        source, device=device, data_dir=data_dir, classes=classes, input_shape=input_shape, specs=[spec]
    )
    dataset = inputs.open_datasets([spec], data_dir=data_dir, like=classifier, limit=limit, seed=seed)
    if len(dataset) == 0 or (dataset.labels < 0).any():
        raise DataError(f"{dataset.name} has no images, or some without a label: an attack needs the right answers")
    make_folder(out.parent)
    maps, where = classifier.label_map(dataset.classes), classifier.device
    generator = torch.Generator().manual_seed(seed)
    attacked, right = [], [0, 0]
    for images, labels, _ in tqdm(
        dataset.batches(batch_size),
        total=-(-len(dataset) // batch_size),
        desc="attacking",
        unit=" batches",
        delay=1,
        disable=workflow.hidden(progress),
    ):
        images, truth = images.to(where), maps[labels].to(where)
        moved = run_attack(settings, classifier, images, truth, settings.eps[0], generator).images
        with torch.no_grad():
            for side, shown in enumerate((images, moved)):
                right[side] += int((classifier(shown).argmax(1) == truth).sum())
        attacked.append(moved.cpu())
    write_hdf5(out, torch.cat(attacked), dataset.labels, list(dataset.ids), dataset.classes)
    n = len(dataset)
    intervals = [wilson_interval(count, n) for count in right]
    found = {
        "file": str(out),
        "dataset": dataset.name,
        "n": n,
        "attack": settings.to_json(),
        "seed": seed,
        "classifier": classifier.fingerprint,
        "clean": {"accuracy": right[0] / n, "ci_low": intervals[0][0], "ci_high": intervals[0][1]},
        "attacked": {"accuracy": right[1] / n, "ci_low": intervals[1][0], "ci_high": intervals[1][1]},
    }
    text = [
        f"{name} accuracy {count / n:.3f} [{low:.3f}, {high:.3f}]"
        for name, count, (low, high) in zip(("clean", "attacked"), right, intervals, strict=True)
    ]
    output.show(found, f"{out}: {n:,} images of {dataset.name}; {'; '.join(text)}", as_json)


def classify(
    paths: Sequence[Path],
    source: str | None,
    folder: Path,
    *,
    k: int | None,
    weighting: str | None,
    top: int,
    convert: bool,
    reject_rate: float | None,
    batch_size: int,
    classes: Path | None,
    input_shape: tuple[int, int, int] | None,
    device: str,
    as_json: bool,
) -> None:
    """Classify image files; each gets the defence's classes, the bare classifier's, and the neighbours."""
    guard = Guard.open(
        folder,
        source,
        k=k,
        weighting=weighting,
        device=device,
        reject_rate=reject_rate,
        classes=classes,
        input_shape=input_shape,
    )
    channels = guard.input_shape[0]
    for path in paths:
        if not convert and image_channels(path) != channels:
            kind, wanted = ("in colour", "grey") if channels == 1 else ("grey", "colour")
            raise InputError(f"{path} is {kind}, but the classifier takes {wanted} images: give --convert")
    found, lines = [], []
    for path, said in zip(paths, guard.stream(list(paths), top=top, neighbors=top, batch_size=batch_size), strict=True):
        found.append({"file": str(path), **said.to_json()})
        marks = ["they disagree"] if not said.agree else []
        marks += [] if said.percentile is None else [f"farther than {said.percentile:.1f} % of clean images"]
        marks += ["too far: rejected"] if said.abstained else []
        lines.append(
            f"{path}: {said.class_name} {said.probability:.3f}; "
            f"bare classifier: {said.bare.class_name} {said.bare.probability:.3f}"
            + (f"   ({'; '.join(marks)})" if marks else "")
        )
        lines += [
            f"    {n.class_name:<12} weight {n.weight:.3f}  distance {n.distance:.3f}  {n.id}" for n in said.neighbors
        ]
    output.show({"k": guard.k, "weighting": guard.weighting, "images": found}, "\n".join(lines), as_json)


def evaluate(
    recipe: Recipe,
    out: Path,
    *,
    data_dir: Path | None,
    device: str,
    as_json: bool,
    progress: bool,
    command: str,
) -> None:
    """Evaluate a classifier and, with a database, its defence; write results, report and finished cells."""
    folder = Path(recipe.database) if recipe.database else None
    classifier, other = (
        inputs.open_classifier(
            name,
            device=device,
            data_dir=data_dir,
            classes=Path(recipe.classes) if recipe.classes else None,
            input_shape=recipe.input_shape,
            specs=() if folder else (recipe.dataset,),
            database=folder,
        )
        if name
        else None
        for name in (recipe.classifier, recipe.surrogate)
    )
    assert classifier is not None
    dataset = inputs.open_datasets([recipe.dataset], data_dir=data_dir, like=classifier)
    defense = calibration = pictures = None
    if folder is not None:
        defense, calibration = inputs.open_defense(classifier, folder, recipe.k, recipe.weighting)
        pictures = inputs.neighbor_pictures(defense.database, data_dir, classifier)
        if pictures is not None:
            inputs.check_disjoint(dataset, pictures)
        else:
            inputs.check_not_in_database(dataset, defense)
        inputs.check_not_calibrated_on(dataset, calibration, folder)
    dataset = dataset if recipe.limit is None else inputs.drawn(dataset, recipe.limit, recipe.seed)
    if other is not None:
        inputs.check_surrogate(other, classifier)
    make_folder(out)
    evaluated = workflow.evaluated(
        recipe, dataset, classifier, defense, other, out, pictures=pictures, progress=progress
    )
    results = workflow.results_of(evaluated, recipe, dataset, classifier, defense, other, calibration, command)
    output.write(out, results, evaluated, as_json)


def headline_of(database: Path | None, budgets: Sequence[float]) -> float:
    """The budget to tabulate where none is named: the calibrated one where it is run, else the largest."""
    calibration = inputs.stored_calibration(database) if database is not None else None
    calibrated = float(calibration["attack"]["eps"][0]) if calibration else None
    return calibrated if calibrated is not None and calibrated in budgets else max(budgets)


def demo(values: dict[str, Any], *, as_json: bool) -> None:
    """Run the whole path; see :func:`nndefense.cli.demo.run_demo`."""
    settings = DemoSettings(**values)
    results, evaluated = run_demo(settings, lambda text: print(text, file=sys.stderr))
    output.write(settings.out, results, evaluated, as_json)


def test_split(spec: str) -> str:
    """The data set that is reported on unless another is named: the same one's test split."""
    name = spec.split(":", 1)[0]
    if name in ("imagefolder", "images", "files", "hdf5", "webdataset", "parquet", "torchvision"):
        raise InputError(f"which images of {spec} are the test images cannot be guessed: give --test")
    return f"{name}:test"
