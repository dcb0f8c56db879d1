"""A classifier behind an input transformation, and what an attacker who knows the transformation differentiates."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nndefense.attacks import Bpda, Eot
from nndefense.attacks.checks import at_least
from nndefense.attacks.wrappers import seeded
from nndefense.images import check_images
from nndefense.models import Classifier

Transform = Callable[[Tensor], Tensor]


class TransformDefense(nn.Module):
    """Transform the image, then classify it; a random transformation may be drawn several times and averaged.

    ``p(x) = 1/draws sum_j softmax(f(t_j(x)))`` (Guo et al., ICLR 2018, section 4). A defence of this kind is a
    transformation, a number of draws, and a word on whether its gradient is of use.

    With a ``seed``, every call draws the same for a batch of the same shape, so that results repeat. The attack model
    draws afresh instead: an attacker knows how a defence draws, not what.
    """

    def __init__(
        self,
        classifier: Classifier,
        transform: Transform,
        *,
        differentiable: bool,
        random: bool,
        draws: int = 1,
        attack_draws: int | None = None,
        seed: int | None = 0,
        views: int = 1,
    ) -> None:
        """
        Args:
            classifier: any classifier.
            transform: images N x C x H x W in [0, 1] -> images of the same shape in [0, 1]; it draws from torch's
                default generators.
            differentiable: whether the transformation's own gradient is exact; else attacks pass it by with the
                identity (BPDA).
            random: whether two calls of the transformation differ.
            draws: draws that a prediction averages, at least 1.
            attack_draws: draws per step of an attack (EOT), at least 1; by default ``draws``, and 10 at least.
            seed: of each call's draws; None leaves them to torch's default generators.
            views: how many images the transformation makes of each, one after another; they are averaged, too.

        Raises:
            InputError: a number of draws that cannot be used.
        """
        super().__init__()
        at_least("draws", draws)
        self.classifier, self.transform = classifier, transform
        self.differentiable, self.random = differentiable, random
        self.draws, self.seed, self.views = draws, seed, views
        self.attack_draws = max(draws, 10) if attack_draws is None else attack_draws
        at_least("attack_draws", self.attack_draws)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images N x C x H x W in [0, 1] -> log-probabilities N x classes.

        Raises:
            InputError: images that are not finite, not in [0, 1] or of the wrong shape.
        """
        check_images(images, channels=self.classifier.input_shape[0])
        with seeded(self.seed, images.device):
            found = [self._answer(self.transform, images) for _ in range(self.draws)]
        return torch.stack(found).logsumexp(0) - math.log(self.draws)

    def attack_model(self, *, draws: int | None = None, generator: torch.Generator | None = None) -> nn.Module:
        """The attack surface: images N x C x H x W -> log-probabilities N x classes, with a gradient to the images.

        The transformation runs in every forward pass; where its gradient is of no use, the backward pass takes it for
        the identity (BPDA, Athalye et al. 2018, section 4.1). A random one is averaged over draws (EOT).

        Args:
            draws: of a random transformation per call; by default ``attack_draws``.
            generator: source of the draws' seeds; by default torch's default generators.

        Raises:
            InputError: fewer than one draw.
        """
        through = _Through(self)
        if not self.random:
            return through
        return Eot(through, self.attack_draws if draws is None else draws, generator=generator)

    def attacked_transform(self) -> Transform:
        """The transformation as an attack differentiates it: by its own gradient, or the identity's (BPDA)."""
        return self.transform if self.differentiable else Bpda(self.transform)

    def _answer(self, transform: Transform, images: Tensor) -> Tensor:
        """Log-probabilities of one draw: N x classes."""
        each: Tensor = self.classifier(transform(images)).log_softmax(1)
        if self.views == 1:
            return each
        return each.view(len(images), self.views, -1).logsumexp(1) - math.log(self.views)


class _Through(nn.Module):
    """The classifier of the transformed image, one draw, with a gradient to the image."""

    def __init__(self, defense: TransformDefense) -> None:
        super().__init__()
        self.defense, self.transform = defense, defense.attacked_transform()
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.defense._answer(self.transform, images)
