"""Randomised smoothing (Cohen, Rosenfeld and Kolter, ICML 2019) of any pipeline from images to scores.

The smoothed classifier gives the class that the pipeline gives most often under Gaussian noise. Noisy images are
clipped to [0, 1], which is a part of the base classifier: the paper's proof asks for nothing of that.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor, nn

from nndefense.attacks.checks import at_least
from nndefense.certificates.noise import noisy_images
from nndefense.certificates.record import ABSTAINED, Certified
from nndefense.errors import InputError
from nndefense.images import check_images
from nndefense.modes import EvaluationOnly

Floats = NDArray[np.float64]


def lower_bound(successes: ArrayLike, n: int, alpha: float) -> Floats:
    """The one-sided Clopper-Pearson bound: with confidence 1 - alpha the chance of success is at least this.

    ``LowerConfBound`` of Cohen et al., section 3.2.2. Errors as for :func:`check_counts`.
    """
    found = np.asarray(successes, dtype=np.int64)
    check_counts(found, n, alpha)
    bound = stats.beta.ppf(alpha, found, n - found + 1)
    result: Floats = np.where(found > 0, bound, 0.0)
    return result


def certify(selected: Tensor, counts: Tensor, sigma: float, alpha: float = 0.001) -> Certified:
    """CERTIFY of Cohen et al. (algorithm 1, section 3.2.2): counts of answers under noise -> classes and l2 radii.

    Args:
        selected: N x classes, how often each class was answered on the first, few draws (the paper's n0).
        counts: N x classes, the same on other draws (n); every image has as many.
        sigma: of the noise, above 0.
        alpha: the chance that a radius is wrong.

    Returns:
        The class that was most often answered on the first draws, and ``sigma * Phi^-1(p)``, where p is the lower bound
        of its chance; where that is at most 1/2, it abstains.

    Raises:
        InputError: sigma or alpha cannot be used, or counts that are no counts.
    """
    check_sigma(sigma)
    if selected.shape != counts.shape or counts.dim() != 2:
        raise InputError("both counts are N x classes, of the same images and classes")
    guess = selected.argmax(1)
    n = counts.sum(1)
    if len(n) and bool((n != n[0]).any()):
        raise InputError("the counts of all images must have the same sum, the number of draws")
    if not len(n):
        return Certified(guess, guess.double(), "l2", alpha)
    low = lower_bound(counts.gather(1, guess[:, None])[:, 0].cpu().numpy(), int(n[0]), alpha)
    sure = torch.from_numpy(low > 0.5)
    radius = torch.from_numpy(sigma * stats.norm.ppf(np.maximum(low, 0.5)))
    # A bound that is barely above 1/2 gives a radius of 0 but no reason to abstain.
    return Certified(torch.where(sure, guess.cpu(), ABSTAINED), torch.where(sure, radius, 0.0), "l2", alpha)


def predict(counts: Tensor, alpha: float = 0.001) -> Tensor:
    """PREDICT of Cohen et al. (algorithm 1, section 3.2.1): counts N x classes -> N classes, -1 where it abstains.

    It abstains where the two most frequent answers may be equally likely: their counts pass the two-sided binomial test
    at the level alpha. So with a chance of 1 - alpha at least, what is answered is the smoothed classifier's class.
    """
    check_counts(counts.cpu().numpy(), int(counts.max()) if counts.numel() else 1, alpha)
    leaders = counts.cpu()
    if leaders.shape[1] == 1:
        return torch.zeros(len(counts), dtype=torch.int64)
    first, second = leaders.topk(2, dim=1).values.numpy().astype(np.int64).T
    # The two-sided test of a fair coin: by symmetry twice the upper tail.
    p = np.minimum(2 * stats.binom.sf(first - 1, first + second, 0.5), 1.0)
    return torch.where(torch.from_numpy(p <= alpha), leaders.argmax(1), ABSTAINED)


def count_answers(
    pipeline: Callable[[Tensor], Tensor],
    images: Tensor,
    sigma: float,
    draws: int,
    *,
    seed: int = 0,
    purpose: str = "count",
    batch_size: int = 512,
) -> Tensor:
    """How often a pipeline answers each class of noisy copies of images (``SampleUnderNoise``): N x classes, int64.

    Each copy costs one forward pass, and a defence that retrieves one search; they are batched over draws and images.

    Args:
        pipeline: images N x C x H x W in [0, 1] -> scores N x classes.
        images: N x C x H x W in [0, 1].
        sigma, draws, seed, purpose, batch_size: as for :func:`~nndefense.certificates.noise.noisy_images`.

    Raises:
        InputError: images or settings that cannot be used.
    """
    check_images(images)
    check_sigma(sigma)
    draws, batch_size = at_least("draws", draws), at_least("batch_size", batch_size)
    counts: Tensor | None = None
    with torch.no_grad():
        for place, each, copies in noisy_images(
            images, sigma, draws, seed=seed, purpose=purpose, batch_size=batch_size
        ):
            scores = pipeline(copies)
            if counts is None:
                counts = torch.zeros((len(images), scores.shape[1]), dtype=torch.int64)
            answers = scores.argmax(1).cpu().view(-1, each)
            counts[place].scatter_add_(1, answers, torch.ones_like(answers))
    if counts is None:
        raise InputError("there is no image to certify: give at least one")
    return counts


def certify_smoothing(
    pipeline: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    sigma: float,
    draws_select: int = 100,
    draws: int = 10_000,
    alpha: float = 0.001,
    seed: int = 0,
    batch_size: int = 512,
) -> Certified:
    """Certify a pipeline smoothed by noise (CERTIFY, with its sampling), in l2.

    Args:
        pipeline, images, sigma, seed, batch_size, and errors: as for :func:`count_answers`.
        draws_select: that the class is chosen on (the paper's n0).
        draws: that its chance is bounded on (n): the radius is at most ``sigma * Phi^-1(alpha ** (1 / n))``.
        alpha: the chance, for each image, that the radius is wrong.
    """
    given = {"seed": seed, "batch_size": batch_size}
    selected = count_answers(pipeline, images, sigma, draws_select, purpose="select", **given)
    return certify(selected, count_answers(pipeline, images, sigma, draws, purpose="certify", **given), sigma, alpha)


class SmoothedClassifier(EvaluationOnly):
    """The smoothed classifier as a defence of its own, that attacks are run on: its answers under noise are counted.

    An image meets the same noise at every call, and another image other noise (:func:`count_answers`).
    """

    def __init__(
        self,
        pipeline: nn.Module,
        sigma: float,
        *,
        draws: int = 1000,
        alpha: float = 0.001,
        follow: nn.Module | None = None,
        seed: int = 0,
        batch_size: int = 512,
    ) -> None:
        """
        Args:
            pipeline, sigma, draws, seed, batch_size: as for :func:`count_answers`.
            alpha: of :meth:`refutes`.
            follow: what an attacker differentiates in the pipeline's place, where its own gradient is of no use.
        """
        super().__init__()
        check_sigma(sigma)
        self.pipeline, self.sigma, self.draws, self.alpha = pipeline, sigma, at_least("draws", draws), alpha
        self.follow = pipeline if follow is None else follow
        self.settings = {"seed": seed, "batch_size": at_least("batch_size", batch_size)}
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """``images`` N x C x H x W in [0, 1] -> the logs of the shares of answers, N x classes."""
        if not len(images):
            nothing: Tensor = self.pipeline(images)
            return nothing
        shares = self._counts(images) / self.draws
        return shares.clamp_min(torch.finfo(torch.float32).tiny).log().to(images.device)

    def refutes(self, images: Tensor, classes: Tensor) -> Tensor:
        """N: whether PREDICT gives these images another class than ``classes`` N; if it is theirs, with a chance of at
        most alpha.
        """
        answer = predict(self._counts(images), self.alpha)
        return (answer != ABSTAINED) & (answer != classes.cpu())

    def attack_model(self, *, draws: int | None = None) -> NoisyMean:
        """What an attacker follows: the mean answer under so many draws (16) of his own at every step."""
        return NoisyMean(self.follow, self.sigma, 16 if draws is None else draws)

    def _counts(self, images: Tensor) -> Tensor:
        return count_answers(self.pipeline, images, self.sigma, self.draws, purpose="answer", **self.settings)


class NoisyMean(EvaluationOnly):
    """The log of a net's mean probability under noise that is drawn anew at every call, with a gradient to the images.

    Attacks on it are those of Salman et al. (NeurIPS 2019, eq. 6) on smoothed classifiers.
    """

    def __init__(self, net: nn.Module, sigma: float, draws: int) -> None:
        super().__init__()
        self.net, self.sigma, self.draws = net, sigma, at_least("draws", draws)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images N x C x H x W in [0, 1] -> log-probabilities N x classes."""
        # On the CPU, so that the draws are the same on every device.
        noise = torch.randn((self.draws, *images.shape)).to(images)
        copies = (images + self.sigma * noise).clamp(0, 1).flatten(0, 1)
        each: Tensor = self.net(copies).log_softmax(1).view(self.draws, len(images), -1)
        return each.logsumexp(0) - float(np.log(self.draws))


def check_sigma(sigma: float) -> None:
    """Raise :class:`InputError` unless sigma is a standard deviation of noise."""
    if not 0 < sigma < np.inf:
        raise InputError(f"sigma is {sigma}, but must be above 0: a standard deviation, in pixels of [0, 1]")


def check_counts(counts: NDArray[np.int64], n: int, alpha: float) -> None:
    """Raise :class:`InputError` unless counts are from 0 to n, n at least 1 and alpha a chance between 0 and 1."""
    if not 0 < alpha < 1:
        raise InputError(f"alpha is {alpha}, but must be above 0 and below 1, such as 0.001")
    if n < 1 or (counts < 0).any() or (counts > n).any():
        raise InputError(f"counts of answers must be from 0 to the number of draws, which is {n} and at least 1")
