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
from nndefense.database import WEIGHTINGS, ImageDatabase, check_vacant
from nndefense.datasets import image_channels, load_image, open_dataset, write_hdf5
from nndefense.errors import DataError, InputError
from nndefense.evaluation import AttackSettings, Recipe, run_attack, wilson_interval
from nndefense.features import FeatureSpec
from nndefense.files import make_folder
from nndefense.models import build_classifier
from nndefense.training import accuracy, train_classifier


def train(
    dataset: str,
    out: Path,
    arch: str,
    *,
    data_dir: Path | None,
    validation: str | None,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Train a classifier and say where it is and how good."""
    images = open_dataset(dataset, data_dir=data_dir)
    held = open_dataset(validation, data_dir=data_dir) if validation else None
    net = build_classifier(arch, input_shape=images.shape, classes=images.classes, seed=options["seed"])
    classifier = train_classifier(net, images, out=out, validation=held, **options)
    found = {
        "classifier": str(out),
        "arch": arch,
        "fingerprint": classifier.fingerprint,
        "training_accuracy": accuracy(classifier, images),
        "validation_accuracy": accuracy(classifier, held) if held else None,
    }
    text = f"{out}: {arch}, training accuracy {found['training_accuracy']:.4f}"
    if held is not None:
        text += f", accuracy on {held.name} {found['validation_accuracy']:.4f}"
    output.show(found, text, as_json)


def index_build(
    specs: Sequence[str],
    source: str,
    feature: FeatureSpec,
    out: Path,
    *,
    classes: Path | None,
    input_shape: tuple[int, int, int] | None,
    data_dir: Path | None,
    device: str,
    limit: int | None,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Build a database and describe it."""
    classifier = inputs.open_classifier(
        source, device=device, data_dir=data_dir, classes=classes, input_shape=input_shape, specs=specs
    )
    images = inputs.open_datasets(specs, data_dir=data_dir, like=classifier, limit=limit, seed=options["seed"])
    database = build_database(images, classifier, feature, out, specs=specs, **options)
    output.describe(database, as_json)


def index_info(folder: Path, *, as_json: bool) -> None:
    """Describe a database without reading its rows."""
    output.describe(ImageDatabase.open(folder, verify=False), as_json)


def index_verify(folder: Path, *, as_json: bool) -> None:
    """Check a database and say that it is whole."""
    found = ImageDatabase.open(folder, verify=False).verify()
    output.show(
        {"database": str(folder), "ok": True, **found},
        f"{folder} is whole: {found['rows']:,} rows, {found['files']} files with the right sha256, no id twice",
        as_json,
    )


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
        f"{workflow.calibration_text(found)}\nbuilt {out}: {len(database):,} rows of {feature}",
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
    maps, where = classifier.label_map(dataset.classes), inputs.device_of(classifier)
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
    source: str,
    folder: Path,
    *,
    k: int | None,
    weighting: str | None,
    top: int,
    convert: bool,
    batch_size: int,
    classes: Path | None,
    input_shape: tuple[int, int, int] | None,
    device: str,
    as_json: bool,
) -> None:
    """Classify image files; each gets the defence's classes, the bare classifier's, and the neighbours."""
    classifier = inputs.open_classifier(
        source, device=device, classes=classes, input_shape=input_shape, database=folder
    )
    defense, _ = inputs.open_defense(classifier, folder, k, weighting)
    channels, *size = classifier.input_shape
    found: list[dict[str, Any]] = []
    for first in range(0, len(paths), batch_size):
        batch = paths[first : first + batch_size]
        for path in batch:
            if not convert and image_channels(path) != channels:
                kind, wanted = ("in colour", "grey") if channels == 1 else ("grey", "colour")
                raise InputError(f"{path} is {kind}, but the classifier takes {wanted} images: give --convert")
        images = torch.stack([load_image(path, channels=channels, size=(size[0], size[1])) for path in batch])
        images = images.to(inputs.device_of(classifier))
        why = defense.explain(images)
        with torch.no_grad():
            bare = classifier(images).softmax(1).cpu()
        found += [
            {
                "file": str(path),
                "defended": output.top_classes(why.log_probabilities[i].exp(), classifier.classes, top),
                "bare": output.top_classes(bare[i], classifier.classes, top),
                "agree": int(why.log_probabilities[i].argmax()) == int(bare[i].argmax()),
                "neighbors": [
                    {
                        "id": why.ids[i][j],
                        "distance": float(why.distances[i, j]),
                        "weight": float(why.weights[i, j]),
                        "class": classifier.classes[int(why.posteriors[i, j].argmax())],
                    }
                    for j in range(min(top, defense.k))
                ],
            }
            for i, path in enumerate(batch)
        ]
    lines = []
    for row in found:
        defended, bare_top = row["defended"][0], row["bare"][0]
        mark = "" if row["agree"] else "   (they disagree)"
        lines.append(
            f"{row['file']}: {defended['class']} {defended['probability']:.3f}; "
            f"bare classifier: {bare_top['class']} {bare_top['probability']:.3f}{mark}"
        )
        lines += [
            f"    {n['class']:<12} weight {n['weight']:.3f}  distance {n['distance']:.3f}  {n['id']}"
            for n in row["neighbors"]
        ]
    output.show({"k": defense.k, "weighting": defense.weighting, "images": found}, "\n".join(lines), as_json)


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
    if name in ("imagefolder", "hdf5"):
        raise InputError(f"which images of {spec} are the test images cannot be guessed: give --test")
    return f"{name}:test"
