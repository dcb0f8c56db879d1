"""What an objective is given and what it gives back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nndefense.attacks.door import labels_of


@dataclass(frozen=True)
class BankRows:
    """The rows that images find their neighbours among.

    Attributes:
        vectors: M x d, float32, the rows' embeddings g_j when they were last computed, without a graph.
        labels: M class numbers, int64; pseudo-labels where a row is an image of a pool.
    """

    vectors: Tensor
    labels: Tensor

    @functools.cached_property
    def by_class(self) -> tuple[Tensor, ...]:
        """The numbers of the rows of each class that has some."""
        counts = torch.bincount(self.labels)
        return torch.split(self.labels.argsort(stable=True), counts[counts > 0].tolist())


@dataclass(frozen=True)
class Batch:
    """One step's images.

    Attributes:
        images: n x C x H x W in [0, 1], float32, on the device.
        labels: n class numbers, of any integer type, which become int64; pseudo-labels where an image is not labelled.
        labelled: n booleans, or None where all images are labelled.
        rows: the labelled images' numbers in the training set, int64, on the device; labelled images come first. None
            in a batch that was not taken from a set.
        others: gives, for the number of a static source of an :class:`nndefense.training.EnsembleAttack`, the
            batch's images as that source attacked them beforehand, shifted and mirrored like ``images``, which is why
            it is no tensor: one source of several is read. None where nothing was attacked beforehand.
        bank: the rows to retrieve from, for objectives that do; else None.
        own: n numbers of the rows that the images are themselves; None without a bank.
    """

    images: Tensor
    labels: Tensor
    labelled: Tensor | None = None
    rows: Tensor | None = None
    others: Callable[[int], Tensor] | None = None
    bank: BankRows | None = None
    own: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", labels_of(self.labels))


@dataclass(frozen=True)
class Outcome:
    """What an objective found on a batch.

    Attributes:
        loss: a scalar to be minimised, with its graph.
        clean: logits n x K of the batch's images as they are, detached; None where not all of them were computed.
        robust: logits n x K of the attacked images in the same order, detached; None where not all were computed.
        parts: detached scalars for the log, by name. An objective that attacks some of the images only reports
            ``clean_accuracy`` and ``robust_accuracy`` here, each over the images that it concerns.
    """

    loss: Tensor
    clean: Tensor | None = None
    robust: Tensor | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)


#: ``(model, images, y, *, loss="cross-entropy" | "kl")`` -> attacked images; y: labels, or clean logits for "kl".
BatchAttack = Callable[..., Tensor]

#: A pure function; it may draw from torch's default generators, which the training seeds anew for every step.
Objective = Callable[[nn.Module, Batch, BatchAttack | None], Outcome]
