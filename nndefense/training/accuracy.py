"""How often a classifier is right."""

from __future__ import annotations

import torch

from nndefense.attacks.modes import attacked_in
from nndefense.datasets import ImageDataset
from nndefense.errors import InputError
from nndefense.models import Classifier, resolve_device


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
    if unknown:
        raise InputError(f"{unknown} of the {len(labels)} images of {dataset.name} have no label: leave those out")
    if int(labels.max()) >= len(dataset.classes):
        raise InputError(
            f"{dataset.name} has the label {int(labels.max())}, but only {len(dataset.classes)} classes: "
            "labels must be class numbers from 0"
        )
