"""What the subcommands do, each as one function of plain values."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nndefense import pipeline
from nndefense.cli import output
from nndefense.datasets import image_channels
from nndefense.errors import InputError
from nndefense.evaluation import AttackSettings, Recipe, calibration_text
from nndefense.guard import Guard


def calibrate(
    specs: Sequence[str],
    source: str,
    out: Path,
    attack: AttackSettings,
    *,
    calibration: str | None,
    n_holdout: int,
    candidates: pipeline.Candidates,
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
    classifier = pipeline.open_classifier(
        source, device=device, data_dir=data_dir, classes=classes, input_shape=input_shape, specs=specs
    )
    database, chosen = pipeline.build_calibrated(
        classifier,
        pipeline.split(specs, calibration, n_holdout, data_dir=data_dir, like=classifier, seed=seed),
        out,
        attack,
        candidates,
        specs=specs,
        overwrite=overwrite,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    output.show(
        {"database": str(out), "rows": len(database), "calibration": chosen.calibration},
        f"{calibration_text(chosen.calibration)}\nbuilt {out}: {len(database):,} rows of {chosen.feature}",
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
    classifier = pipeline.open_classifier(
        source, device=device, data_dir=data_dir, classes=classes, input_shape=input_shape, specs=[spec]
    )
    dataset = pipeline.open_datasets([spec], data_dir=data_dir, like=classifier, limit=limit, seed=seed)
    found = pipeline.write_attacked(
        settings,
        classifier,
        dataset,
        out,
        overwrite=overwrite,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    text = "; ".join(
        f"{name} accuracy {found[name]['accuracy']:.3f} [{found[name]['ci_low']:.3f}, {found[name]['ci_high']:.3f}]"
        for name in ("clean", "attacked")
    )
    output.show(found, f"{out}: {found['n']:,} images of {dataset.name}; {text}", as_json)


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
    results = pipeline.evaluate(recipe, out, data_dir=data_dir, device=device, progress=progress, command=command)
    output.show_results(out, results, as_json)


def demo(settings: pipeline.DemoSettings, *, as_json: bool) -> None:
    """Run the whole path; see :func:`nndefense.pipeline.run_demo`."""
    results = pipeline.run_demo(settings, lambda text: print(text, file=sys.stderr))
    output.show_results(settings.out, results, as_json)
