"""How often a net is right: of a whole set, and of the images held out while a training goes on.

Robust accuracy on new images falls again while that on the training images still rises (Rice, Wong and Kolter, ICML
2020), so the weights of the best check are worth keeping. And a net that is trained with a single attack step can, from
one epoch to the next, become robust to that step alone, with no robustness to several (Wong, Rice and Kolter, ICLR
2020, section 5.4): catastrophic overfitting. Each check attacks the same images with the same random draws.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from nndefense.attacks.wrappers import attacked_in
from nndefense.datasets import ImageDataset
from nndefense.errors import InputError
from nndefense.models import Classifier, resolve_device
from nndefense.training.batch import BatchAttack
from nndefense.training.batches import DeviceImages
from nndefense.training.ensemble_attack import EnsembleAttack
from nndefense.training.inner_attack import InnerAttack
from nndefense.training.launcher import Team
from nndefense.training.random_state import generator, kept, reseed
from nndefense.training.settings import TrainingSettings


def accuracy(
    classifier: Classifier,
    dataset: ImageDataset,
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> float:
    """Return the share in [0, 1] of the images whose class gets the highest logit.

    The classifier is used in evaluation mode and then put back in the mode that it was in.

    Args:
        classifier: its classes are matched with the data set's by :meth:`Classifier.label_map`.
        dataset: N labelled images.
        batch_size: images at a time; it does not change the result.
        device: the classifier is moved there; where it is by default.

    Raises:
        InputError: the set is empty or has images without a label, or they do not fit the classifier.
        ModelError: the classifier does not have the data set's classes.
    """
    dataset = dataset.usable
    check_labels(dataset)
    target = classifier.device if device is None else resolve_device(device)
    classifier.to(target)
    numbers = classifier.label_map(dataset.classes).to(target)
    right = torch.zeros((), dtype=torch.int64, device=target)
    with attacked_in(classifier), torch.inference_mode():
        for images, labels, _ in dataset.batches(batch_size):
            right += (classifier(images.to(target)).argmax(1) == numbers[labels.to(target)]).sum()
    return int(right) / len(dataset)


def check_labels(dataset: ImageDataset) -> None:
    """Raise :class:`InputError` unless there are images and each has a label that is one of the classes."""
    labels = dataset.labels
    if len(labels) == 0:
        raise InputError(f"{dataset.name} has no images: choose another set or slice")
    unknown = int((labels < 0).sum())
    if unknown == len(labels):
        raise InputError(
            f"{dataset.name} has no labels: give labelled images, such as a folder for each class (imagefolder:PATH) "
            "or a .csv list with a column label (files:LIST)"
        )
    if unknown:
        raise InputError(f"{unknown} of the {len(labels)} images of {dataset.name} have no label: leave those out")
    if int(labels.max()) >= len(dataset.classes):
        raise InputError(
            f"{dataset.name} has the label {int(labels.max())}, but only {len(dataset.classes)} classes: "
            "labels must be class numbers from 0"
        )


_STEPS = 10
_BATCH = 256
# Of a training set, where there are no images held out: collapse shows on it as well.
_OWN_IMAGES = 256


class CatastrophicOverfitting(UserWarning):
    """A net that is being trained is robust to its own single attack step, but not to several."""


class ValidationChecks:
    """A fixed sample of images that is attacked at every check.

    Args:
        classifier: the net that is trained.
        dataset: the training set, sampled where there is no validation set.
        validation: images held out, or None.
        attack: of the training, or None.
        validation_attack: for the checks, or None for :func:`stronger` than the training's.
        settings: of the training.
        team: the processes that share the work.
        retrieves: whether it is a training by retrieval.
    """

    def __init__(
        self,
        classifier: Classifier,
        dataset: ImageDataset,
        validation: ImageDataset | None,
        attack: BatchAttack | None,
        validation_attack: BatchAttack | None,
        settings: TrainingSettings,
        team: Team,
        *,
        retrieves: bool = False,
    ) -> None:
        self.seed = settings.seed
        self.team = team
        self.held_out = validation is not None
        self.validation: DeviceImages | None = None
        if validation is not None:
            self.validation = DeviceImages(validation, team.device)
            numbers = classifier.label_map(validation.classes)[torch.from_numpy(validation.labels)]
            self.validation_labels = numbers.to(team.device)
        self.single = attack if isinstance(attack, InnerAttack) and attack.steps == 1 and attack.eps > 0 else None
        if retrieves and validation is None:
            # Each image of the training set would find itself.
            self.single = None
        self.attack = validation_attack if validation_attack is not None or attack is None else stronger(attack)
        # Without images held out, only a collapse is looked for.
        self.active = self.attack is not None and (self.held_out or self.single is not None)
        if self.active:
            source = dataset if validation is None else validation
            most = min(len(source), settings.check_images if self.held_out else _OWN_IMAGES)
            rows = torch.randperm(len(source), generator=generator(settings.seed, 0, "check"))[:most].sort().values
            images, labels = source.batch(rows)
            self.count = most
            own = team.share(torch.arange(most))
            self.images = images[own].to(team.device)
            self.labels = classifier.label_map(source.classes)[labels[own]].to(team.device)

    def validation_accuracy(self, net: nn.Module) -> float:
        """The share of a net's right answers on the whole validation set, as :func:`accuracy` gives it."""
        assert self.validation is not None
        own = self.team.share(torch.arange(len(self.validation)))
        right = torch.zeros((), dtype=torch.int64, device=self.team.device)
        with attacked_in(net), torch.inference_mode():
            for rows in torch.split(own, _BATCH):
                images = self.validation.fetch(rows)
                right += (net(images).argmax(1) == self.validation_labels[rows.to(right.device)]).sum()
        return int(self.team.sum(right)) / len(self.validation)

    def check(self, net: nn.Module) -> dict[str, Any]:
        """Attack the sample through a net; return the shares of images that keep their right class, by name.

        ``accuracy`` of the images as they are, ``robust_accuracy`` under the attack of the checks, and for a training
        with a single step ``single_step_accuracy`` under that. In evaluation mode and float32.
        """
        assert self.attack is not None
        attacks: dict[str, BatchAttack | None] = {"accuracy": None, "robust_accuracy": self.attack}
        if self.single is not None:
            attacks["single_step_accuracy"] = self.single
        right = torch.zeros(len(attacks), dtype=torch.float64 if self.team.device.type != "mps" else torch.float32)
        right = right.to(self.team.device)
        batches = list(zip(torch.split(self.images, _BATCH), torch.split(self.labels, _BATCH), strict=True))
        with attacked_in(net), kept(self.team.device):
            for number, attack in enumerate(attacks.values()):
                reseed(self.seed, 0, f"check {number} {self.team.rank}", self.team.device)
                for images, labels in batches:
                    right[number] += self._right(net, images, labels, attack)
        shares = (self.team.sum(right) / self.count).tolist()
        return dict(zip(attacks, shares, strict=True))

    def _right(self, net: nn.Module, images: Tensor, labels: Tensor, attack: BatchAttack | None) -> Tensor:
        if attack is not None:
            with torch.enable_grad():
                images = attack(net, images, labels)
        with torch.no_grad():
            logits: Tensor = net(images)
            return (logits.argmax(1) == labels).sum()


def stronger(attack: BatchAttack) -> BatchAttack:
    """The attack of the checks for a training with ``attack``: as many steps, but no fewer than ten.

    It leads away from the true label, whatever the training's leads to: a net can withstand every step towards the
    least likely class and none away from its own (Engstrom, Ilyas and Athalye 2018). Of an :class:`EnsembleAttack` it
    is the attack on the net itself. Any other attack stays what it is.
    """
    if isinstance(attack, EnsembleAttack):
        attack = attack.step
    if not isinstance(attack, InnerAttack):
        return attack
    if attack.steps >= _STEPS:
        return dataclasses.replace(attack, mode="eval", target="label")
    return dataclasses.replace(attack, steps=_STEPS, step_size=None, start="uniform", mode="eval", target="label")


def collapsed(single: float, robust: float, top: float) -> bool:
    """Whether a net shows catastrophic overfitting.

    Of the images that withstand the single step, fewer than half withstand several, with at least 20 points between;
    and either the robust accuracy has fallen below half of its own best, or less than a quarter withstand several. A
    net that is only not robust yet, early in a training, fails the second part.

    Args:
        single: accuracy under the single step of the training.
        robust: accuracy under several steps.
        top: the highest ``robust`` of any earlier check.
    """
    return robust < single / 2 and single - robust >= 0.2 and (robust < top / 2 or robust < single / 4)
