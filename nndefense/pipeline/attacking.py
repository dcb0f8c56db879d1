"""Attacking a classifier on a data set, and keeping the attacked images as a data set of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nndefense.attacks.losses import least_likely_other
from nndefense.bars import progress_bar
from nndefense.datasets import ImageDataset, write_hdf5
from nndefense.errors import DataError, InputError
from nndefense.evaluation import AttackSettings, run_attack
from nndefense.evaluation.judging import confident
from nndefense.locks import writes
from nndefense.models import Classifier
from nndefense.statistics import wilson_interval

LEAST_LIKELY, RANDOM = "least-likely", "random"


@writes("out", file=True)
def write_attacked(
    settings: AttackSettings,
    classifier: Classifier,
    dataset: ImageDataset,
    out: Path,
    *,
    target: str | None = None,
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
        target: send each image towards this class of the classifier (its name, id or number), the class that it holds
            for the least likely (``least-likely``) or one drawn for each image (``random``), never the image's own: an
            image of that class stays as it is. Default: away from its own.
        overwrite: replace it.
        batch_size: images per forward pass.
        seed: of the random starts and targets.
        progress: whether to show a bar.

    Returns:
        Plain values: the file, what was attacked and how, and for ``clean`` and ``attacked`` the accuracy with its
        Wilson 95 % interval, the mean probability of the class that is answered (``confidence``) and that over the
        wrong answers (``confidence_wrong``, None without any). With a target also ``target``: of the ``n`` images of
        other classes the shares with their intervals that are taken for their target before the attack (``before``)
        and after it (``success``), and for yet another wrong class (``merely_wrong``); and the mean probability of the
        target where it is reached (``confidence``, None where it never is).

    Raises:
        DataError: no images, some without a label, or none but of the class that is the target.
        InputError: the file exists, no class is the target, or the attack cannot be sent towards one.
    """
    if target is not None:
        settings.attack.check_targeted()
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists: choose another file, or --overwrite")
    dataset = dataset.usable
    n = len(dataset)
    if n == 0 or (dataset.labels < 0).any():
        raise DataError(f"{dataset.name} has no images, or some without a label: an attack needs the right answers")
    maps, where = classifier.label_map(dataset.classes), classifier.device
    generator = torch.Generator().manual_seed(seed)
    aim = _Aim(target, classifier, n, seed) if target is not None else None
    if aim and set(maps[dataset.labels].tolist()) == {aim.number}:
        raise DataError(f"all images of {dataset.name} are of the class {aim.name!r}: choose another target (--target)")
    attacked, answers = [], []
    for images, labels, _ in progress_bar(
        dataset.batches(batch_size), total=-(-n // batch_size), desc="attacking", unit=" batches", shown=progress
    ):
        images, truth = images.to(where), maps[labels].to(where)
        with torch.no_grad():
            scores = classifier(images)
        goals = aim.next(scores, truth) if aim else truth
        # An image of the class that is aimed at has nowhere to go.
        here = (goals != truth) | (aim is None)
        moved = images.clone()
        if bool(here.any()):
            moved[here] = run_attack(
                settings, classifier, images[here], goals[here], settings.eps[0], generator, targeted=aim is not None
            ).images
        with torch.no_grad():
            sides = [*confident(scores), *confident(classifier(moved))]
        answers.append(torch.stack([truth, goals, *sides]).double().cpu())
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
    truth, goals, *sides = torch.cat(answers, 1)
    for name, said, sure in zip(("clean", "attacked"), sides[::2], sides[1::2], strict=True):
        wrong = said != truth
        found[name] = _share("accuracy", ~wrong)
        found[name] |= {"confidence": float(sure.mean()), "confidence_wrong": _mean(sure[wrong])}
    if aim:
        others, (before, _, said, sure) = goals != truth, sides
        reached = (said == goals) & others
        found["target"] = {
            "asked": aim.name,
            "n": int(others.sum()),
            "before": _share("share", (before == goals)[others]),
            "success": _share("share", reached[others]),
            "merely_wrong": _share("share", ((said != goals) & (said != truth))[others]),
            "confidence": _mean(sure[reached]),
        }
    return found


def _share(name: str, hits: Tensor) -> dict[str, float]:
    """A share of images with its Wilson 95 % interval."""
    low, high = wilson_interval(int(hits.sum()), len(hits))
    return {name: int(hits.sum()) / len(hits), "ci_low": low, "ci_high": high}


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


class _Aim:
    """Where each image of a data set is sent, batch by batch."""

    def __init__(self, target: str, classifier: Classifier, n: int, seed: int) -> None:
        self.name, self._done = target, 0
        #: The class that all images are to reach, if it is one.
        self.number: int | None = None
        if target not in (LEAST_LIKELY, RANDOM):
            self.number = classifier.class_number(target)
            self.name = classifier.classes[self.number]
        # Beside the random starts, so that targets do not depend on the batch size, nor starts on the target.
        generator = torch.Generator().manual_seed(seed)
        self._steps = torch.randint(1, len(classifier.classes), (n,), generator=generator)

    def next(self, scores: Tensor, truth: Tensor) -> Tensor:
        """The class to reach for each image of the next batch: scores N x K and true classes N -> N."""
        steps = self._steps[self._done : self._done + len(truth)].to(truth.device)
        self._done += len(truth)
        if self.number is not None:
            return torch.full_like(truth, self.number)
        if self.name == LEAST_LIKELY:
            return least_likely_other(scores, truth)
        return (truth + steps) % scores.shape[1]
