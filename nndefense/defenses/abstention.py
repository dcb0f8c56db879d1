"""Scores to abstain by: how far an image is from being answered, by net, retrieval, both, or the database."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nndefense.attacks.retrieval import Rejection
from nndefense.defenses.nearest_neighbor import NearestNeighborDefense
from nndefense.defenses.surface import RelaxedDefense

Answer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AbstentionScore:
    """A score that is large where a prediction is not to be trusted.

    Attributes:
        name: in tables.
        of: images N x C x H x W -> N, the true score.
        followed: the same with a gradient to the images, for attackers who must stay below a threshold.
    """

    name: str
    of: Callable[[Tensor], Tensor]
    followed: Callable[[Tensor], Tensor]

    def rejection(self, answer: Answer, threshold: float, spread: float) -> Rejection:
        """What an attacker meets where images beyond the threshold are rejected; the excess is in ``spread``."""

        def accepts(images: Tensor) -> Tensor:
            with torch.no_grad():
                return self.of(images) <= threshold

        return Rejection(answer, lambda images: (self.followed(images) - threshold) / spread, accepts)


def margin_score(answer: Tensor) -> Tensor:
    """Minus the margin of the two likeliest classes, ``z_(2) - z_(1)``, of logits or log-probabilities: N x C -> N.

    It is at most 0, and 0 where two classes are equally likely. In logarithms, where a net that is sure of
    itself does not saturate.
    """
    top = answer.topk(2, dim=1).values
    return top[:, 1] - top[:, 0]


def disagreement_score(first: Tensor, second: Tensor) -> Tensor:
    """Jeffreys' divergence of two answers, ``KL(p || q) + KL(q || p)`` in nats: logits or log-probabilities N x C -> N.

    It is 0 where they are equal, and grows without end where each is sure of another class, so that its gradient is
    not lost there, as that of a bounded divergence is (Jeffreys 1946).
    """
    log_p, log_q = first.log_softmax(1), second.log_softmax(1)
    found: Tensor = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1)
    return found


def net_score(net: nn.Module) -> AbstentionScore:
    """The margin of the bare classifier."""
    return AbstentionScore("net margin", lambda x: margin_score(net(x)), lambda x: margin_score(net(x)))


def answer_scores(name: str, net: nn.Module, model: nn.Module, followed: Answer) -> list[AbstentionScore]:
    """The margin of a defence's own answer, called ``name``, and its disagreement with the net that it defends.

    Args:
        name: of the margin.
        net: images -> logits N x C.
        model: images -> the true answer, log-probabilities N x C.
        followed: the same with a gradient.
    """
    return [
        AbstentionScore(name, lambda x: margin_score(model(x)), lambda x: margin_score(followed(x))),
        AbstentionScore(
            "disagreement",
            lambda x: disagreement_score(net(x), model(x)),
            lambda x: disagreement_score(net(x), followed(x)),
        ),
    ]


def distance_score(defense: NearestNeighborDefense) -> AbstentionScore:
    """The distance of an image's feature vector to the nearest row, as the guard takes it."""
    rows = defense.surface().need_rows("the distance")

    def true(images: Tensor) -> Tensor:
        distances, _ = defense.database.search(defense.extractor(images), 1)
        return distances[:, 0].to(images.device)

    def followed(images: Tensor) -> Tensor:
        features = defense.extractor(images)
        _, nearest = rows.nearest(features.detach(), 1)
        # The root's slope is infinite at 0.
        found: Tensor = (features - rows.vectors(nearest[:, 0])).square().sum(1).clamp_min(1e-12).sqrt()
        return found

    return AbstentionScore("distance", true, followed)


def relaxed_answer(defense: NearestNeighborDefense) -> Answer:
    """The defence's true answer with the gradient of its relaxation: images -> log-probabilities N x C."""
    return RelaxedDefense(defense.surface(), mode="straight-through")
