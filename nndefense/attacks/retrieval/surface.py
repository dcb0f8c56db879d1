"""What an attacker of a retrieval defence can hold in his hands: callables, and how much he is taken to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from nndefense.errors import InputError

Found = tuple[Tensor, Tensor]


class Knowledge(Enum):
    """What the attacker of a retrieval defence knows (levels after Dubey et al. 2019 and Tramer et al., NeurIPS 2020).

    GRAY (L0): the classifier, and nothing of the defence.
    FEATURES (L1): also the feature, K and the weighting, but no row; his own images at most.
    PARTIAL (L2): also a share of the rows, the overlap.
    WHITE (L3): everything, all rows included.
    """

    GRAY = "L0"
    FEATURES = "L1"
    PARTIAL = "L2"
    WHITE = "L3"

    @property
    def words(self) -> str:
        """What it means, in words, for a report."""
        return {
            "L0": "knows the classifier; not the feature, not the database",
            "L1": "knows the classifier, the feature, K and the weighting; no row of the database",
            "L2": "knows all but a part of the database's rows",
            "L3": "knows everything, all rows of the database included",
        }[self.value]


class Nearest(Protocol):
    """Exact search in the attacker's rows."""

    def __call__(self, features: Tensor, m: int, *, of: Tensor | None = None, but: Tensor | None = None) -> Found:
        """Distances N x m (ascending, infinite where fewer are left) and rows N x m of features N x d.

        ``of`` (N classes) finds only rows predicted as that class, ``but`` only rows predicted as another.
        """


@dataclass
class Counts:
    """What an attack cost, in images: one forward pass of 50 images counts 50.

    Attributes:
        forwards: passes of an image through the feature net or the classifier, made by the attack itself.
        backwards: gradients with respect to an image.
        searches: searches of an image's neighbours in the attacker's rows.
        queries: predictions asked of the true pipeline (each is a forward pass and a search of the defence).
    """

    forwards: int = 0
    backwards: int = 0
    searches: int = 0
    queries: int = 0

    def reset(self) -> None:
        """Begin again at 0."""
        self.forwards = self.backwards = self.searches = self.queries = 0


@dataclass(frozen=True)
class Rows:
    """The attacker's rows: part of the defender's, his own images', or both.

    Attributes:
        count: how many there are.
        nearest: exact search among them.
        vectors: row numbers, of any shape -> feature vectors, ``rows.shape`` x d.
        posteriors: row numbers -> what each votes for, ``rows.shape`` x C: the classifier's posterior, or where labels
            vote the one-hot label.
        weights: row numbers -> weights as the defence would give them, ``rows.shape``.
        images: row numbers M -> images M x C x H x W, or None where the attacker has only vectors.
        overlap: the share of the defender's rows that are among them, 0 to 1.
        temperature: T of the defence's kernel ``exp(-d^2 / T)`` on the weights; None: it has none.
    """

    count: int
    nearest: Nearest
    vectors: Callable[[Tensor], Tensor]
    posteriors: Callable[[Tensor], Tensor]
    weights: Callable[[Tensor], Tensor]
    images: Callable[[Tensor], Tensor] | None = None
    overlap: float = 1.0
    temperature: float | None = None


@dataclass(frozen=True)
class Rejection:
    """What rejects images, and whose answer counts where it does not; the defence's side declares it.

    Attributes:
        answer: images N x C x H x W -> the answer's log-probabilities or logits N x classes, differentiable.
        excess: images -> N, by how much each image's score passes the threshold, at most 0 where the image is accepted;
            differentiable, with values as near to the true ones as the attacker can have them.
        accepts: images -> N truth values of the TRUE score: the last word.
    """

    answer: Callable[[Tensor], Tensor]
    excess: Callable[[Tensor], Tensor]
    accepts: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RetrievalSurface:
    """The attack surface of a retrieval defence at one level of knowledge.

    Attributes:
        knowledge: what the attacker is taken to know.
        predict: images N x C x H x W in [0, 1] -> log-probabilities N x classes of the TRUE pipeline; every attack's
            last word, at every level.
        k: neighbours that the defence takes.
        classify: images -> logits of the classifier, differentiable; None where the defence does not tell.
        features: images -> vectors N x d, differentiable; None for GRAY.
        rows: the attacker's rows; None for GRAY, and for FEATURES without images of his own.
        alpha: the share of the classifier's own posterior in the defence's answer, 0 to 1.
        rejection: None where every image is answered; else an image fools only if it is accepted, too.
        counts: what attacks on this surface have cost so far.
        counting: whether the callables count already.
    """

    knowledge: Knowledge
    predict: Callable[[Tensor], Tensor]
    k: int
    classify: Callable[[Tensor], Tensor] | None = None
    features: Callable[[Tensor], Tensor] | None = None
    rows: Rows | None = None
    alpha: float = 0.0
    rejection: Rejection | None = None
    counts: Counts = field(default_factory=Counts)
    counting: bool = False

    def counted(self) -> RetrievalSurface:
        """The same surface, whose callables note in ``counts`` what they are asked for; made once by the attacks."""
        if self.counting:
            return self
        rows = self.rows
        return replace(
            self,
            predict=_count(self.predict, self.counts, "queries"),
            classify=None if self.classify is None else _count(self.classify, self.counts, "forwards"),
            features=None if self.features is None else _count(self.features, self.counts, "forwards"),
            rows=None if rows is None else replace(rows, nearest=_count_searches(rows.nearest, self.counts)),
            counting=True,
        )

    @property
    def temperature(self) -> float | None:
        """T of the kernel that is known with the rows; None without."""
        return None if self.rows is None else self.rows.temperature

    @property
    def smooth(self) -> bool:
        """Whether the answer moves while the same rows are the nearest: by a kernel, or by the classifier's share."""
        return bool(self.alpha) or self.temperature is not None

    @torch.no_grad()
    def fooled(self, images: Tensor, y: Tensor) -> Tensor:
        """Whether the true pipeline gives N images another class than y, and accepts them: N truth values."""
        wrong = self.predict(images).argmax(1).to(y.device) != y
        return wrong if self.rejection is None else wrong & self.rejection.accepts(images).to(y.device)

    def need_features(self, attack: str) -> Callable[[Tensor], Tensor]:
        """The feature map, or an :class:`InputError` that says what the attack needs."""
        if self.features is None:
            raise InputError(
                f"{attack} needs to know the features: make the surface at L1 or above, not {self.knowledge.value}"
            )
        return self.features

    def need_rows(self, attack: str) -> Rows:
        """The attacker's rows, or an :class:`InputError` that says what the attack needs."""
        self.need_features(attack)
        if self.rows is None:
            raise InputError(
                f"{attack} needs rows to aim at: make the surface at L2 or L3, or at L1 with images of the attacker's"
            )
        return self.rows

    def need_classifier(self, attack: str) -> Callable[[Tensor], Tensor]:
        """The classifier, or an :class:`InputError` that says what the attack needs."""
        if self.classify is None:
            raise InputError(f"{attack} follows the classifier too: give the surface its classify")
        return self.classify


def _count(call: Callable[[Tensor], Tensor], counts: Counts, what: str) -> Callable[[Tensor], Tensor]:
    def counted(images: Tensor) -> Tensor:
        setattr(counts, what, getattr(counts, what) + len(images))
        return call(images)

    return counted


def _count_searches(nearest: Nearest, counts: Counts) -> Nearest:
    def counted(features: Tensor, m: int, *, of: Tensor | None = None, but: Tensor | None = None) -> Found:
        counts.searches += len(features)
        return nearest(features, m, of=of, but=but)

    return counted
