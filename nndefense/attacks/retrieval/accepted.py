"""Wrong and accepted: what an attack on a defence that may abstain raises.

An image that is rejected fools nobody, and so an attack that does not look at the rejection says nothing about it
(Carlini and Wagner, AISec 2017; Tramer, ICML 2022). Both aims are pursued by one ascent: away from the true
class as long as the answer is right, and below the threshold as soon as it is wrong (selective gradients: Bryniarski et
al., ICLR 2022), or both at once, by hinges.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from nndefense.attacks.losses import margin
from nndefense.attacks.retrieval.ascent import Objective, Problem, Raised
from nndefense.attacks.retrieval.surface import Rejection, RetrievalSurface
from nndefense.errors import InputError

# How far beyond the boundary of the classes, and below the threshold, the hinges still push.
_SLACK = 0.1

Combine = Callable[[Tensor, Tensor, Tensor], Tensor]


def selective(raised: Tensor, wrong: Tensor, excess: Tensor) -> Tensor:
    """What is raised while the answer is right, and minus the excess where it is wrong and rejected: N each -> N."""
    return torch.where(wrong & (excess > 0), -excess, raised)


def hinged(raised: Tensor, wrong: Tensor, excess: Tensor) -> Tensor:
    """``-relu(slack - raised) - relu(excess + slack)``, for a margin in logits and a score in its spreads: N -> N."""
    return -F.relu(_SLACK - raised) - F.relu(excess + _SLACK)


class Decision(Objective):
    """The margin of the answer itself, ``max_{c != y} z_c - z_y``, by whatever it is made: needs a rejection."""

    state = ("y",)
    looks_at_features = False

    def __init__(self, surface: RetrievalSurface) -> None:
        self.answer = rejection_of(surface).answer

    def renew(self, problem: Problem, features: Tensor) -> None:
        """Note the classes."""
        self.y = problem.y

    def value(self, images: Tensor, features: Tensor, progress: float) -> Raised:
        """The margin, which is its own score."""
        found = margin(self.answer(images), self.y)
        return Raised(found, found.detach(), found > 0)


class Accepted(Objective):
    """Another objective whose images must be accepted, too.

    Args:
        surface: with a rejection.
        wrong: raises what leads to a wrong answer, with scores of its own.
        combine: :func:`selective` or :func:`hinged`.
    """

    def __init__(self, surface: RetrievalSurface, wrong: Objective, combine: Combine = selective) -> None:
        self.excess, self.wrong, self.combine = rejection_of(surface).excess, wrong, combine
        self.refresh, self.looks_at_features = wrong.refresh, wrong.looks_at_features

    def renew(self, problem: Problem, features: Tensor) -> None:
        """Look around for the other objective."""
        self.wrong.renew(problem, features)

    def value(self, images: Tensor, features: Tensor, progress: float) -> Raised:
        """Both aims in one; the score is above 0 where the attacker's copy is wrong and accepts."""
        found = self.wrong.value(images, features, progress)
        assert found.score is not None
        assert found.fooled is not None
        excess = self.excess(images)
        now = excess.detach()
        score = torch.minimum(found.score, -now)
        return Raised(self.combine(found.value, found.fooled, excess), score, found.fooled & (now <= 0))

    def keep(self, index: Tensor) -> None:
        """Go on with some of the images only."""
        self.wrong.keep(index)


def rejection_of(surface: RetrievalSurface) -> Rejection:
    """The surface's rejection, or an :class:`InputError` that says what is missing."""
    if surface.rejection is None:
        raise InputError("an attack that must be accepted needs a surface with a rejection: give it one")
    return surface.rejection
