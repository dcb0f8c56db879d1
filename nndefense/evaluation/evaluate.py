"""Accuracy of defences under attacks: each attacked batch is made once and shown to every defence."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nndefense import attacks
from nndefense.datasets import ImageDataset
from nndefense.errors import DataError, InputError
from nndefense.evaluation.statistics import wilson_interval
from nndefense.evaluation.threats import AttackSettings, ThreatModel


@dataclass(frozen=True)
class Subject:
    """A defence under test, or the bare classifier.

    Attributes:
        name: ``none`` for the bare classifier, else beginning with ``nearest-neighbor``.
        model: images N x C x H x W in [0, 1] -> scores N x K (logits or log-probabilities).
        variant: what it is in the comparison: ``none``, ``calibrated``, ``weighting``, ``layer`` or ``rows``.
        database: fingerprint of its database, or None.
        database_rows: number of rows that it searches, or None.
        every_eps: whether it is run at every radius, or only clean and at the headline radius.
    """

    name: str
    model: nn.Module
    variant: str
    database: str | None = None
    database_rows: int | None = None
    every_eps: bool = True


@dataclass(frozen=True)
class Record:
    """One accuracy with all that is needed to say what it is an accuracy of.

    ``accuracy`` is the fraction of all n images that are classified rightly after the attack; ``ci_low`` and
    ``ci_high`` are its Wilson 95 % interval. ``eps`` is in units of ``norm``; ``eps_raw`` is the mean radius over
    the images in raw pixels of [0, 1] (per entry for linf, an l2 length otherwise). ``seconds`` is the time of the
    defence's predictions, ``attack_seconds`` that of the attack, which all defences of a cell share.
    """

    dataset: str
    defense: str
    variant: str
    attack: str
    steps: int
    restarts: int
    threat_model: str
    norm: str
    eps: float
    eps_raw: float
    n: int
    accuracy: float
    ci_low: float
    ci_high: float
    seed: int
    seconds: float
    attack_seconds: float
    classifier: str
    database: str | None
    database_rows: int | None
    surrogate: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values for a results file."""
        return asdict(self)


def evaluate(
    dataset: ImageDataset,
    subjects: Sequence[Subject],
    threats: Sequence[ThreatModel],
    attack: AttackSettings,
    *,
    headline_eps: float,
    classifier: str,
    label_maps: Mapping[str, Tensor],
    seed: int = 0,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
    progress: Callable[[int], object] = lambda images: None,
) -> list[Record]:
    """Measure every subject clean and under every threat model at every radius.

    The random starts of a cell (threat model and radius) depend on the seed alone, so that cells can be compared
    and repeated one by one.

    Args:
        dataset: labelled images.
        subjects: what to measure.
        threats: whom to attack.
        attack: how.
        headline_eps: the radius at which even subjects without ``every_eps`` are run; one of ``attack.eps``.
        classifier: fingerprint of the classifier, for the records.
        label_maps: for each threat model's name, and ``clean`` for the subjects, the class number of the attacked
            (measured) model for each class of the data set.
        seed: draws the random starts.
        batch_size: images per forward pass.
        device: where the images are put.
        progress: called with the number of images after each batch of each cell.

    Raises:
        DataError: an empty data set, or images without labels.
        InputError: two subjects of one name.
    """
    if len(dataset) == 0:
        raise DataError(f"the data set {dataset.name} is empty: there is nothing to evaluate on")
    if (dataset.labels < 0).any():
        raise DataError(f"the data set {dataset.name} has images without a label: an accuracy needs a label for each")
    names = [subject.name for subject in subjects]
    if len(set(names)) != len(names):
        raise InputError(f"two subjects have the same name among {', '.join(names)}: name them apart")
    records: list[Record] = []
    cells: list[tuple[ThreatModel | None, float]] = [(None, 0.0)]
    cells += [(threat, eps) for threat in threats for eps in attack.eps]
    for threat, eps in cells:
        active = [s for s in subjects if threat is None or s.every_eps or eps == headline_eps]
        correct, seconds = dict.fromkeys((s.name for s in active), 0), dict.fromkeys((s.name for s in active), 0.0)
        generator = torch.Generator().manual_seed(seed)
        attack_seconds = radii = 0.0
        for images, labels, _ in dataset.batches(batch_size):
            images, truth = images.to(device), label_maps["clean"][labels].to(device)
            if threat is not None:
                radii += float(attacks.radius(images, eps, attack.norm).sum())
                begun = time.perf_counter()
                aims = label_maps[threat.name][labels].to(device)
                images = attack.run(threat.target, images, aims, eps, generator)
                attack_seconds += time.perf_counter() - begun
            for subject in active:
                begun = time.perf_counter()
                with torch.no_grad():
                    correct[subject.name] += int((subject.model(images).argmax(1) == truth).sum())
                seconds[subject.name] += time.perf_counter() - begun
            progress(len(images))
        n = len(dataset)
        settings = attack.to_json()
        for subject in active:
            low, high = wilson_interval(correct[subject.name], n)
            records.append(
                Record(
                    dataset=dataset.name,
                    defense=subject.name,
                    variant=subject.variant,
                    attack=attack.name if threat else "none",
                    steps=settings["steps"] if threat else 0,
                    restarts=settings["restarts"] if threat else 0,
                    threat_model=threat.name if threat else "clean",
                    norm=attack.norm if threat else "none",
                    eps=eps,
                    eps_raw=radii / n,
                    n=n,
                    accuracy=correct[subject.name] / n,
                    ci_low=low,
                    ci_high=high,
                    seed=seed,
                    seconds=round(seconds[subject.name], 4),
                    attack_seconds=round(attack_seconds, 4),
                    classifier=classifier,
                    database=subject.database,
                    database_rows=subject.database_rows,
                    surrogate=threat.surrogate if threat else None,
                )
            )
    return records
