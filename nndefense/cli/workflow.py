"""The steps that commands share: each takes opened objects and settings, and knows nothing of options or printing."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from index_build import build_databases
from nndefense.cli import inputs
from nndefense.datasets import ImageDataset
from nndefense.defenses import NearestNeighborDefense
from nndefense.errors import InputError
from nndefense.evaluation import AttackSettings, Evaluated, Recipe, Subject, assemble, attack_all, run
from nndefense.features import WIDEST, FeatureSpec, spatial_layers, spread, vector_widths
from nndefense.models import Classifier

_CANDIDATE_PCA_SAMPLE = 2048
POOLINGS = ("avg", "rmac", "grid4", "grid8")


def candidate_features(
    classifier: Classifier, layers: Sequence[str] | None, poolings: Sequence[str], pca: int, count: int = 6
) -> list[FeatureSpec]:
    """The layers and poolings worth trying: given layers, or ``count`` spread over the depth of the net.

    Left out: a finer grid than the layer's map (it equals a coarser one), and raw vectors of over 8,192 dimensions.
    """
    example = torch.full((1, *classifier.input_shape), 0.5, device=classifier.device)
    names = list(layers) if layers else spread(spatial_layers(classifier.net, example), count)
    features = []
    for name, widths in zip(names, vector_widths(classifier, names, poolings, example), strict=True):
        seen = set()
        for pooling, width in zip(poolings, widths, strict=True):
            kind = width if pooling.startswith("grid") else pooling
            if kind not in seen and width <= WIDEST:
                features.append(FeatureSpec(name, pooling, pca=pca))
            seen.add(kind)
    if not features:
        raise InputError("no layer gives vectors of a usable length: name layers and poolings yourself")
    return features


def calibrate_on(
    classifier: Classifier,
    rows: ImageDataset,
    held: ImageDataset,
    features: Sequence[FeatureSpec],
    attack: AttackSettings,
    eps: float,
    *,
    ks: Sequence[int],
    weightings: Sequence[str],
    max_clean_loss: float,
    batch_size: int,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """Build a candidate database of ``rows`` for each feature, and choose among them on the held-out images.

    Returns:
        Plain values: the calibration, the images it was made on, the attack and the number of candidate rows.
    """
    inputs.check_disjoint(held, rows)
    with tqdm(
        total=len(held), desc="attacking calibration images", unit=" images", delay=1, disable=hidden(progress)
    ) as bar:
        attacked = attack_all(
            attack,
            classifier,
            held,
            eps,
            batch_size=batch_size,
            seed=seed,
            device=classifier.device,
            progress=bar.update,
        )
    with tempfile.TemporaryDirectory(prefix="nndefense-") as folder:
        paths = {Path(folder) / f"candidate-{i:02d}": feature for i, feature in enumerate(features)}
        databases = build_databases(
            rows,
            classifier,
            paths,
            batch_size=batch_size,
            pca_sample=_CANDIDATE_PCA_SAMPLE,
            seed=seed,
            progress=progress,
        )
        _, calibration = NearestNeighborDefense.calibrate(
            classifier,
            databases,
            *attacked,
            ks=ks,
            weightings=weightings,
            max_clean_loss=max_clean_loss,
            batch_size=batch_size,
            progress=lambda found: tqdm(
                found, desc="comparing settings", unit=" layers", delay=1, disable=hidden(progress)
            ),
        )
    return {
        **calibration.to_json(),
        "dataset": held.name,
        "ids": list(held.ids),
        "candidate_rows": len(rows),
        "attack": {**attack.to_json(), "eps": [eps]},
        "seed": seed,
    }


def evaluated(
    recipe: Recipe,
    dataset: ImageDataset,
    classifier: Classifier,
    defense: NearestNeighborDefense | None,
    surrogate: Classifier | None,
    out: Path,
    *,
    others: Sequence[Subject] = (),
    pictures: ImageDataset | None = None,
    progress: bool = True,
) -> Evaluated:
    """Run a recipe with a progress bar; finished cells stand in ``out/cells``, and are not run again."""
    with tqdm(desc="evaluating", unit=" images", delay=1, disable=hidden(progress)) as bar:

        def step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return run(
            recipe,
            dataset,
            classifier,
            defense,
            surrogate,
            others=others,
            pictures=pictures,
            cells=out / "cells",
            progress=step,
        )


def results_of(
    found: Evaluated,
    recipe: Recipe,
    dataset: ImageDataset,
    classifier: Classifier,
    defense: NearestNeighborDefense | None,
    surrogate: Classifier | None,
    calibration: dict[str, Any] | None,
    command: str,
) -> dict[str, Any]:
    """The results file of an evaluation, as plain values."""
    return assemble(
        found.records,
        recipe=recipe,
        dataset=dataset,
        classifier=classifier,
        surrogate=surrogate,
        defense=defense,
        # The ids serve to keep these images out of the test set; a reader of the results needs their number.
        calibration={k: v for k, v in calibration.items() if k != "ids"} if calibration else None,
        audit=found.audit,
        command=command,
    )


def hidden(progress: bool) -> bool | None:
    """What tqdm's ``disable`` should be: None hides the bar where standard error is a file or a pipe."""
    return None if progress else True
