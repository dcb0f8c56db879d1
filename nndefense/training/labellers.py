"""Where pseudo-labels come from: a teacher, the nearest labelled images, or both.

Nothing here is calibrated: a confidence serves to rank images of one class, and says how often its label is right only
as far as that was measured. Each is in [0, 1].

* ``teacher``: the largest softmax probability p_c (``probability``), or its lead over the second one (``margin``).
* ``retrieval``: the share s_c of the K neighbours' votes that the winning label has.
* ``agreement``: the label that both give, with p_c * s_c; where they differ, none.
* ``product``: the largest of q_c = p_c * s'_c / sum_j p_j * s'_j, where s'_c = (K s_c + 1/C) / (K + 1) are the shares
  with one more neighbour whose vote is spread over all C classes, so that no class is ruled out by K votes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nndefense.attacks.wrappers import attacked_in
from nndefense.database import WEIGHTINGS, ImageDatabase
from nndefense.datasets import ImageDataset
from nndefense.errors import DataError, InputError, ModelError
from nndefense.models import Classifier

CONFIDENCES = ("probability", "margin")
VOTES = ("distance", *WEIGHTINGS)
RULES = ("product", "agreement")
# Nearer than this part of its own length, a neighbour of the same id is the image itself.
_SELF = 1e-3


@dataclass(frozen=True)
class Guess:
    """Pseudo-labels of n images.

    Attributes:
        labels: int64 n, class numbers; -1 for none.
        confidence: float32 n, in [0, 1]; 0 where there is no label.
        parts: labels and confidence of each labeller that was combined, by its name.
    """

    labels: Tensor
    confidence: Tensor
    parts: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Labeller(Protocol):
    """Whatever gives pseudo-labels to images."""

    @property
    def classifier(self) -> Classifier:
        """The classifier whose classes the labels are, and which says what images fit."""

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Guess:
        """Label n images n x C x H x W in [0, 1] with their n ids."""

    def as_dict(self) -> dict[str, Any]:
        """All that the labels depend on, as plain values."""


class Teacher:
    """Labels by a classifier (self-training: Scudder 1965; here as in Carmon et al. 2019, step 3)."""

    def __init__(self, classifier: Classifier, confidence: str = "probability") -> None:
        """
        Args:
            classifier: used in evaluation mode, on its own device.
            confidence: one of :data:`CONFIDENCES`.

        Raises:
            InputError: another confidence.
        """
        if confidence not in CONFIDENCES:
            raise InputError(f"there is no confidence {confidence!r}: choose {' or '.join(CONFIDENCES)}")
        self.classifier, self.confidence = classifier, confidence

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """The softmax, n x C, float32 on the CPU.

        Raises:
            ModelError: the classifier gives NaN or infinite logits.
        """
        with attacked_in(self.classifier):
            logits: Tensor = self.classifier(images.to(self.classifier.device)).float().cpu()
        if not bool(logits.isfinite().all()):
            raise ModelError(f"the teacher {self.classifier.source} gives NaN or infinite logits: train it again")
        return logits.softmax(1)

    def guess(self, probabilities: Tensor) -> Guess:
        """Labels and confidence from the softmax n x C."""
        top = probabilities.topk(2, dim=1)
        first, second = top.values.unbind(1)
        return Guess(top.indices[:, 0], first - second if self.confidence == "margin" else first)

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Guess:
        """See :meth:`Labeller.__call__`."""
        return self.guess(self.probabilities(images))

    def as_dict(self) -> dict[str, Any]:
        """See :meth:`Labeller.as_dict`."""
        return {"by": "teacher", "confidence": self.confidence, "teacher": _identity(self.classifier)}


class Retrieval:
    """Labels by the votes of the K nearest labelled images in a database."""

    def __init__(
        self,
        classifier: Classifier,
        database: ImageDatabase,
        k: int = 10,
        votes: str = "distance",
        *,
        labelled: ImageDataset | None = None,
    ) -> None:
        """
        Args:
            classifier: the one that the database was made with.
            database: its rows of known label vote.
            k: neighbours, from 1 to the number of rows that vote.
            votes: what a neighbour's vote weighs: ``distance``, the nearest one's distance over its own; or a weight
                of its own posterior (:func:`nndefense.database.neighbor_weights`), ``uniform``, ``cbw-e``, ``cbw-d``.
            labelled: only images with ids of this set vote; by default all whose label is known.

        Raises:
            InputError: no row may vote, k is out of range, or there are no such votes.
            DatabaseError: the database was made with another classifier.
        """
        if votes not in VOTES:
            raise InputError(f"there are no votes {votes!r}: choose one of {', '.join(VOTES)}")
        rows = database.row_numbers
        known = database.labels(rows).numpy() >= 0
        if labelled is not None:
            wanted = set(labelled.ids)
            held = np.fromiter((item in wanted for item in database.ids(rows)), dtype=np.bool_, count=len(rows))
            if int(held.sum()) < len(wanted):
                raise InputError(
                    f"the database {database.path} holds {int(held.sum()):,} of the {len(wanted):,} images of "
                    f"{labelled.name}: build it from them"
                )
            known &= held
        if not known.any():
            raise InputError(f"no image in {database.path} has a label to vote with: build it from labelled images")
        self.voters = int(known.sum())
        self._which = hashlib.sha256(rows[known].astype("<i8").tobytes()).hexdigest()
        if not 1 <= k <= self.voters:
            raise InputError(f"k is {k}, but must be from 1 to the {self.voters:,} labelled images: lower k")
        with attacked_in(classifier):
            self.extractor = database.extractor(classifier)
        self.database = database if known.all() else database.subset(rows[known])
        self.classifier, self.k, self.votes = classifier, k, votes

    @torch.no_grad()
    def shares(self, images: Tensor, ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Each label's share of the votes, n x C, and the neighbours' labels n x K, nearest first.

        Raises:
            DataError: an image of the pool stands among the labelled ones, and would be given its own true label.
        """
        with attacked_in(self.extractor):
            vectors = self.extractor(images.to(self.classifier.device)).cpu()
        distances, rows = self.database.search(vectors, self.k)
        self._check_strangers(distances, rows, vectors, ids)
        labels = self.database.labels(rows)
        if self.votes == "distance":
            # Relative to the nearest, so that the unit of the features does not matter; 0 / 0 is a full vote.
            weights = torch.where(distances > 0, distances[:, :1] / distances.clamp_min(1e-38), 1.0)
        else:
            weights = self.database.weights(rows, self.votes).float()
            # All neighbours at the uniform posterior weigh nothing: then they vote alike.
            weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
        totals = torch.zeros(len(images), len(self.classifier.classes)).scatter_add_(1, labels, weights)
        return totals / totals.sum(1, keepdim=True), labels

    def guess(self, shares: Tensor, neighbours: Tensor) -> Guess:
        """The label of most votes; among equals, that of the nearest neighbour."""
        best = shares.max(1, keepdim=True).values
        winners = (shares >= best - 1e-6).gather(1, neighbours)
        first = winners.to(torch.uint8).argmax(1, keepdim=True)
        return Guess(neighbours.gather(1, first)[:, 0], best[:, 0])

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Guess:
        """See :meth:`Labeller.__call__`; raises as :meth:`shares`."""
        return self.guess(*self.shares(images, ids))

    def as_dict(self) -> dict[str, Any]:
        """See :meth:`Labeller.as_dict`."""
        return {
            "by": "retrieval",
            "k": self.k,
            "votes": self.votes,
            "voters": self.voters,
            "voters_sha256": self._which,
            "database": self.database.fingerprint,
            "teacher": _identity(self.classifier),
        }

    def _check_strangers(self, distances: Tensor, rows: Tensor, vectors: Tensor, ids: Sequence[str]) -> None:
        at, place = torch.nonzero(distances <= _SELF * vectors.norm(dim=1, keepdim=True), as_tuple=True)
        if not len(at):
            return
        for image, found in zip(at.tolist(), self.database.ids(rows[at, place]), strict=True):
            if ids[image] == found:
                raise DataError(
                    f"the pool's image {found} stands in the database {self.database.path} with its true label: name "
                    "the labelled images, or build a database of them alone"
                )


class Combined:
    """Labels by a teacher and by retrieval together; the rules are those of this module's docstring."""

    def __init__(self, teacher: Teacher, retrieval: Retrieval, rule: str = "product") -> None:
        """
        Args:
            teacher, retrieval: of one classifier, or of two with the same classes.
            rule: one of :data:`RULES`.

        Raises:
            InputError: another rule, or other classes.
        """
        if rule not in RULES:
            raise InputError(f"there is no rule {rule!r}: choose {' or '.join(RULES)}")
        if teacher.classifier.classes != retrieval.classifier.classes:
            raise InputError(
                "the teacher and the database's classifier have other classes, so their labels cannot be compared: "
                "use a database of the teacher's"
            )
        self.teacher, self.retrieval, self.rule = teacher, retrieval, rule

    @property
    def classifier(self) -> Classifier:
        """The teacher's classifier."""
        return self.teacher.classifier

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Guess:
        """See :meth:`Labeller.__call__`; raises as :meth:`Retrieval.shares`."""
        probabilities = self.teacher.probabilities(images)
        shares, neighbours = self.retrieval.shares(images, ids)
        mine, theirs = self.teacher.guess(probabilities), self.retrieval.guess(shares, neighbours)
        parts = {"teacher": (mine.labels, mine.confidence), "retrieval": (theirs.labels, theirs.confidence)}
        if self.rule == "agreement":
            same = mine.labels == theirs.labels
            probability = probabilities.gather(1, mine.labels[:, None])[:, 0]
            return Guess(
                torch.where(same, mine.labels, -1), torch.where(same, probability * theirs.confidence, 0.0), parts
            )
        joint = probabilities * (self.retrieval.k * shares + 1 / shares.shape[1])
        joint = F.normalize(joint, p=1, dim=1)
        confidence, labels = joint.max(1)
        return Guess(labels, confidence, parts)

    def as_dict(self) -> dict[str, Any]:
        """See :meth:`Labeller.as_dict`."""
        return {"by": self.rule, "parts": [self.teacher.as_dict(), self.retrieval.as_dict()]}


def _identity(classifier: Classifier) -> dict[str, str]:
    return {"fingerprint": classifier.fingerprint, "arch": classifier.arch, "source": classifier.source}
