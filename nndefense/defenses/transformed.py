"""A classifier behind an input transformation, and what an attacker who knows the transformation differentiates."""

from __future__ import annotations

import copy
import math
import secrets
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from nndefense.attacks import Bpda
from nndefense.attacks.checks import at_least
from nndefense.errors import InputError
from nndefense.images import check_images
from nndefense.models import Classifier
from nndefense.modes import EvaluationOnly, evaluating


class RandomTransform(Protocol):
    """A transformation that draws: what chance decides is drawn first, image by image, and then applied."""

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What is drawn for each image, its first axis N, from this generator or torch's default one."""

    def __call__(self, images: Tensor, drawn: Tensor | None = None) -> Tensor:
        """Images N x C x H x W in [0, 1] -> images of the same shape in [0, 1]."""


class TransformDefense(EvaluationOnly):
    """Transform the image, then classify it; a random transformation may be drawn several times and averaged.

    ``p(x) = 1/draws sum_j softmax(f(t_j(x)))`` (Guo et al., ICLR 2018, section 4). A defence of this kind is a
    transformation, a number of draws, and a word on whether its gradient is of use.

    What a random one draws differs from image to image and from call to call, and comes from a secret seed, since an
    attacker who knows the draws is a stronger one. With a ``seed`` the same calls in the same order give the same
    answers. :meth:`with_seed` is the defence begun again, :meth:`fixed` the one whose draws are known.
    """

    def __init__(
        self,
        classifier: Classifier,
        transform: Callable[[Tensor], Tensor] | RandomTransform,
        *,
        differentiable: bool,
        random: bool,
        draws: int = 1,
        attack_draws: int | None = None,
        seed: int | None = None,
        views: int = 1,
    ) -> None:
        """
        Args:
            classifier: any classifier.
            transform: images N x C x H x W in [0, 1] -> images of the same shape in [0, 1].
            differentiable: whether the transformation's own gradient is of use; else attacks pass it by with the
                identity (BPDA).
            random: whether it draws; then it is a :class:`RandomTransform`.
            draws: draws that a prediction averages, at least 1.
            attack_draws: draws per step of an attack (EOT), at least 1; by default ``draws``, and 10 at least.
            seed: of the draws; None takes one from the system's secrets.
            views: how many images the transformation makes of each, one after another; they are averaged, too.

        Raises:
            InputError: a number of draws that cannot be used, or a random transformation without ``draw``.
        """
        super().__init__()
        draws = at_least("draws", draws)
        if random and not hasattr(transform, "draw"):
            raise InputError("a random transformation needs a method draw(images, generator)")
        self.classifier, self.transform = classifier, transform
        self.differentiable, self.random = differentiable, random
        self.draws, self.views = draws, views
        self.attack_draws = at_least("attack_draws", max(draws, 10) if attack_draws is None else attack_draws)
        self._known: int | None = None
        self._chance = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        self.eval()

    @property
    def softened(self) -> bool:
        """Whether attacks climb a stand-in with another value than the transformation's."""
        return False

    def with_seed(self, seed: int) -> TransformDefense:
        """The same defence, over the same net, whose draws begin at this seed."""
        other = copy.copy(self)
        other._chance = torch.Generator().manual_seed(seed)
        return other

    def fixed(self, seed: int) -> TransformDefense:
        """The same defence when its seed is known: every image meets the same draws at every call.

        :meth:`attack_model` differentiates exactly these.
        """
        other = self.with_seed(seed)
        other._known, other.random = seed, False
        return other

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images N x C x H x W in [0, 1] -> log-probabilities N x classes.

        Raises:
            InputError: images that are not finite, not in [0, 1] or of the wrong shape.
        """
        check_images(images, channels=self.classifier.input_shape[0])
        images = images.to(self.classifier.mean.dtype)
        drawn = self.drawn(images, self.draws, self._chance)
        return log_mean([self.answer(self.transformed(images, one)) for one in drawn])

    def attack_model(self, *, draws: int | None = None, generator: torch.Generator | None = None) -> TransformSurface:
        """The attack surface: images N x C x H x W -> log-probabilities N x classes, with a gradient to the images.

        Args:
            draws: of a random transformation per call; by default ``attack_draws``. Where the seed is known, they are
                those of the defence.
            generator: source of the attacker's own draws; by default torch's default generator.

        Raises:
            InputError: fewer than one draw.
        """
        count = self.attack_draws if draws is None else at_least("draws", draws)
        return TransformSurface(self, count if self.random else self.draws, generator)

    def drawn(self, images: Tensor, count: int, generator: torch.Generator | None) -> list[Tensor | None]:
        """What so many draws of the transformation are for these images; None each where nothing is random."""
        transform: Any = self.transform
        if self.random:
            return [transform.draw(images, generator) for _ in range(count)]
        if self._known is None:
            return [None] * count
        chance = torch.Generator().manual_seed(self._known)
        each = [transform.draw(images[:1], chance) for _ in range(count)]
        return [one.expand(len(images), *one.shape[1:]) for one in each]

    def attacked(self, images: Tensor, drawn: Tensor | None) -> Tensor:
        """The transformed images as an attack differentiates them: by their own gradient, or the identity's (BPDA)."""
        if self.differentiable:
            return self.transformed(images, drawn)
        passed: Tensor = Bpda(lambda seen: self.transformed(seen, drawn))(images)
        return passed

    def stand_in(self, images: Tensor, drawn: Tensor | None, progress: float) -> Tensor:
        """What an attack climbs in place of the transformation, nearer to it as ``progress`` goes from 0 to 1."""
        return self.attacked(images, drawn)

    def answer(self, transformed: Tensor) -> Tensor:
        """Log-probabilities of one draw's images: N x classes."""
        with evaluating(self.classifier):
            each: Tensor = self.classifier(transformed).log_softmax(1)
        if self.views == 1:
            return each
        return each.view(-1, self.views, each.shape[1]).logsumexp(1) - math.log(self.views)

    def transformed(self, images: Tensor, drawn: Tensor | None) -> Tensor:
        """The images after the transformation by one draw of :meth:`drawn`."""
        transform: Any = self.transform
        found: Tensor = transform(images) if drawn is None else transform(images, drawn)
        return found


def log_mean(draws: list[Tensor]) -> Tensor:
    """The log of the mean probability of draws, each log-probabilities N x K: N x K."""
    return torch.stack(draws).logsumexp(0) - math.log(len(draws))


class TransformSurface(EvaluationOnly):
    """A defence by transformation as who knows it sees it: the mean over an attacker's own draws (EOT).

    Called, it gives the log of the mean probability, N x classes, of the true transformation with the gradient of its
    stand-in. :meth:`predictions` are single answers of the defence, for attacks on random defences.
    """

    def __init__(self, defense: TransformDefense, draws: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.defense, self.draws, self.generator = defense, draws, generator
        #: Forward passes of the classifier in one call.
        self.passes = draws * defense.views
        #: Whether what :meth:`predictions` gives with ``progress`` is not the true answer.
        self.softened = defense.softened
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Log of the mean probability: N x C x H x W -> N x classes."""
        defense = self.defense
        drawn = defense.drawn(images, self.draws, self.generator)
        return log_mean([defense.answer(defense.attacked(images, one)) for one in drawn])

    def predictions(self, images: Tensor, progress: float | None = None) -> Tensor:
        """Answers of the defence, each over as many draws as it averages itself: M x N x classes.

        Args:
            images: N x C x H x W in [0, 1].
            progress: how far an attack has come, from 0 to 1: the answers are those of the stand-in that it climbs.
                None gives the true ones, without a gradient.
        """
        defense = self.defense
        drawn = defense.drawn(images, self.draws, self.generator)
        with torch.set_grad_enabled(progress is not None and torch.is_grad_enabled()):
            each = [
                defense.answer(
                    defense.transformed(images, one) if progress is None else defense.stand_in(images, one, progress)
                )
                for one in drawn
            ]
        size = min(defense.draws, len(each))
        return torch.stack([log_mean(each[i : i + size]) for i in range(0, len(each) - size + 1, size)])
