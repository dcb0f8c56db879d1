"""Attacking a classifier on a data set, and keeping the attacked images as a data set of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nndefense.datasets import ImageDataset, write_hdf5
from nndefense.errors import DataError, InputError
from nndefense.evaluation import AttackSettings, run_attack
from nndefense.locks import writes
from nndefense.models import Classifier
from nndefense.statistics import wilson_interval


@writes("out", file=True)
def write_attacked(
    settings: AttackSettings,
    classifier: Classifier,
    dataset: ImageDataset,
    out: Path,
    *,
    overwrite: bool = False,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Attack a data set's images and keep them as float32, with the ids of their originals.

    Args:
        settings: the attack, at the first of its budgets.
        classifier: what is attacked.
        dataset: labelled images of the classifier's shape.
        out: HDF5 file, which opens as ``hdf5:FILE``.
        overwrite: replace it.
        batch_size: images per forward pass.
        seed: of the random starts.
        progress: whether to show a bar.

    Returns:
        Plain values: the file, what was attacked and how, and the accuracy with its Wilson 95 % interval, ``clean`` and
        ``attacked``.

    Raises:
        DataError: no images, or some without a label.
        InputError: the file exists.
    """
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists: choose another file, or --overwrite")
    dataset = dataset.usable
    n = len(dataset)
    if n == 0 or (dataset.labels < 0).any():
        raise DataError(f"{dataset.name} has no images, or some without a label: an attack needs the right answers")
    maps, where = classifier.label_map(dataset.classes), classifier.device
    generator = torch.Generator().manual_seed(seed)
    attacked, right = [], [0, 0]
    for images, labels, _ in tqdm(
        dataset.batches(batch_size),
        total=-(-n // batch_size),
        desc="attacking",
        unit=" batches",
        delay=1,
        disable=None if progress else True,
    ):
        images, truth = images.to(where), maps[labels].to(where)
        moved = run_attack(settings, classifier, images, truth, settings.eps[0], generator).images
        with torch.no_grad():
            for side, shown in enumerate((images, moved)):
                right[side] += int((classifier(shown).argmax(1) == truth).sum())
        attacked.append(moved.cpu())
    write_hdf5(out, torch.cat(attacked), dataset.labels, list(dataset.ids), dataset.classes)
    found: dict[str, Any] = {
        "file": str(out),
        "dataset": dataset.name,
        "n": n,
        "attack": settings.to_json(),
        "seed": seed,
        "classifier": classifier.fingerprint,
    }
    for name, count in zip(("clean", "attacked"), right, strict=True):
        low, high = wilson_interval(count, n)
        found[name] = {"accuracy": count / n, "ci_low": low, "ci_high": high}
    return found
