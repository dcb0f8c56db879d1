"""Nearest neighbours of the mean feature under Gaussian noise, which moves slowly with the image: margins are radii.

Pautov et al. (2022) certify prototypes so; here it is a vote of K rows.

- Features are projected on a ball, of radius R around the rows' mean. For a unit vector v the part of the mean feature
  along v is the integral of a function between -R and R against a Gaussian, so that a move of the image by r in l2
  moves it by at most 2R times the total variation of two Gaussians at that distance:
  ``t(r) = 2R (2 Phi(r / (2 sigma)) - 1)``. Its slope at 0, the largest, is the known ``R sqrt(2 / pi) / sigma``.
- A feature that moves by at most t changes every distance by at most t. Row j can be among the K nearest only where
  ``d_j - t <= d_(K) + t``, and is for certain where ``d_j + t < d_(K+1) - t``. The vote for the class against any other
  is least for one choice of the rows between, and where that is positive for all others, the class stands.
- The mean of m draws misses the mean feature by at most e but for a chance alpha (:func:`mean_error`), which the margin
  pays: the radius is that of ``t - e``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from scipy import stats
from torch import Tensor

from nndefense.attacks.checks import at_least
from nndefense.attacks.retrieval import Knowledge, RetrievalSurface
from nndefense.certificates.noise import noisy_images
from nndefense.certificates.record import ABSTAINED, Certified
from nndefense.certificates.smoothing import check_counts, check_sigma
from nndefense.database import combine
from nndefense.errors import InputError
from nndefense.images import check_images
from nndefense.modes import EvaluationOnly

# Rows beyond the K nearest that a margin is looked for among, and halvings of its interval.
_ROWS, _HALVINGS = 2048, 40
# A lead of the vote below this may be rounding.
_LEAD = 1e-6


def radius_of(move: Tensor, sigma: float, ball: float) -> Tensor:
    """The l2 radius within which the mean of features in a ball moves by at most ``move``: the inverse of t(r)."""
    share = (0.5 + move.double().clamp_min(0) / (4 * ball)).clamp_max(1.0).cpu()
    return torch.from_numpy(2 * sigma * stats.norm.ppf(share.numpy()))


def mean_error(spread: Tensor, spread_variance: Tensor, draws: int, ball: float, alpha: float) -> Tensor:
    """By how much the mean of draws in a ball of radius R misses their expectation, at most, with chance 1 - alpha.

    ``sqrt(2 V L / m) + 4 R L / m`` with L = log(4 / alpha) at half of alpha, for independent vectors of variance V no
    farther than 2R from their mean (Smale and Zhou 2007, lemma 2, after Pinelis 1994). V is bounded at the other half
    by half the squared distances of m / 2 pairs of draws, which lie between 0 and 2 R^2 and have V as their mean
    (Maurer and Pontil 2009, theorem 4).

    Args:
        spread, spread_variance: N, mean and sample variance of half the squared distances of the pairs.
        draws: m, at least 4.
        ball: R.
        alpha: the chance that it is missed by more.
    """
    pairs, log = draws // 2, math.log(4 / alpha)
    variance = spread + (2 * spread_variance * log / pairs).sqrt() + 7 * 2 * ball**2 * log / (3 * (pairs - 1))
    # About any point of the ball, its centre too, the mean square is at least the variance.
    variance = variance.clamp_max(ball**2)
    return (2 * variance * log / draws).sqrt() + 4 * ball * log / draws


@dataclass(frozen=True)
class _Mean:
    """The mean feature of N images from m draws, N x d float64, and half the squared distances of pairs of draws."""

    feature: Tensor
    spread: Tensor
    spread_variance: Tensor
    draws: int


class SmoothedFeatures(EvaluationOnly):
    """A defence: the vote of the K rows nearest to the mean feature of an image under noise.

    Rows, weights, K and kernel are those of a retrieval defence. An image meets the same noise at every call.
    """

    def __init__(
        self,
        base: RetrievalSurface,
        sigma: float,
        *,
        draws: int = 1000,
        alpha: float = 0.001,
        seed: int = 0,
        batch_size: int = 512,
    ) -> None:
        """
        Args:
            base: of the retrieval defence at L3.
            sigma: of the noise, in pixels of [0, 1].
            draws: that the mean is taken over, at least 4.
            alpha: of :meth:`refutes`.
            seed: of the noise.
            batch_size: noisy copies for each forward pass.

        Raises:
            InputError: settings that cannot be used, a surface without all rows, or a defence in whose answer the
                classifier has a share.
        """
        super().__init__()
        check_sigma(sigma)
        rows, self.features = base.need_rows("smoothed features"), base.need_features("smoothed features")
        if base.knowledge is not Knowledge.WHITE or rows.overlap < 1:
            raise InputError("smoothed features need every row of the defence: make the surface at L3")
        if base.alpha:
            raise InputError("smoothed features need an answer of the neighbours alone: take a rule with alpha 0")
        self.base, self.rows, self.sigma = base, rows, sigma
        self.draws, self.alpha = at_least("draws", draws, 4), alpha
        self.seed, self.batch_size = seed, at_least("batch_size", batch_size)
        every = torch.arange(rows.count)
        vectors = rows.vectors(every).double()
        self.centre = vectors.mean(0)
        # No row is moved by the projection.
        self.ball = max(float((vectors - self.centre).norm(dim=1).max()), 1e-12)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """``images`` N x C x H x W in [0, 1] -> log-probabilities N x classes."""
        mean = self._mean(images, self.draws, "answer").feature
        return self._vote(mean).clamp_min(torch.finfo(torch.float32).tiny).log().to(images.device)

    def surface(self) -> RetrievalSurface:
        """What an attacker who knows everything holds: the mean feature over 8 draws of his own, with a gradient."""
        return replace(self.base, predict=self, features=_AttackersMean(self, 8))

    def refutes(self, images: Tensor, classes: Tensor) -> Tensor:
        """N: whether the vote at the mean feature of ``images`` is another class than ``classes`` N; where it is
        theirs, with a chance of at most alpha.
        """
        found = self.certify(images, self.draws, self.alpha, purpose="answer")
        return (found.radius > 0) & (found.prediction != classes.cpu())

    @torch.no_grad()
    def certify(self, images: Tensor, draws: int, alpha: float, *, purpose: str = "certify") -> Certified:
        """Class and l2 radius of images; where the mean of so many draws does not settle the class, it abstains.

        Args:
            images: N x C x H x W in [0, 1].
            draws: at least 4.
            alpha: the chance, for each image, that what is said of it is wrong.
            purpose: other ones have other noise.
        """
        check_counts(torch.zeros(1, dtype=torch.int64).numpy(), 1, alpha)
        mean = self._mean(images, at_least("draws", draws, 4), purpose)
        error = mean_error(mean.spread, mean.spread_variance, mean.draws, self.ball, alpha)
        prediction = self._vote(mean.feature).argmax(1).cpu()
        margin = self._margin(mean.feature, prediction)
        sure = margin > error.cpu()
        # Of features in the ball no mean moves by more than its diameter.
        radius = radius_of((margin - error.cpu()).clamp_min(0), self.sigma, self.ball)
        return Certified(torch.where(sure, prediction, ABSTAINED), torch.where(sure, radius, 0.0), "l2", alpha)

    def inside(self, features: Tensor) -> Tensor:
        """``features`` N x d, brought into the ball along the ray from its centre."""
        centre = self.centre.to(features)
        away = features - centre
        length = torch.linalg.vector_norm(away, dim=1, keepdim=True)
        found: Tensor = centre + away * (self.ball / length.clamp_min(self.ball))
        return found

    def _mean(self, images: Tensor, draws: int, purpose: str) -> _Mean:
        check_images(images)
        draws -= draws % 2
        total = half = square = None
        for place, each, copies in noisy_images(
            images, self.sigma, draws, seed=self.seed, purpose=purpose, batch_size=max(self.batch_size, 2) // 2 * 2
        ):
            found = self.inside(self.features(copies).double()).view(-1, each, self.centre.numel())
            apart = (found[:, 0::2] - found[:, 1::2]).square().sum(2) / 2
            if total is None or half is None or square is None:
                total = found.new_zeros((len(images), found.shape[2]))
                half, square = found.new_zeros(len(images)), found.new_zeros(len(images))
            total[place] += found.sum(1)
            half[place] += apart.sum(1)
            square[place] += apart.square().sum(1)
        if total is None or half is None or square is None:
            raise InputError("there is no image to certify: give at least one")
        pairs = draws // 2
        spread = half / pairs
        variance = ((square - pairs * spread.square()) / (pairs - 1)).clamp_min(0)
        return _Mean(total / draws, spread, variance, draws)

    def _vote(self, features: Tensor) -> Tensor:
        distances, found = self.rows.nearest(features.float(), self.base.k)
        return combine(self.rows.posteriors(found).float(), self._weights(found, distances)).float()

    def _weights(self, found: Tensor, distances: Tensor) -> Tensor:
        weights = self.rows.weights(found)
        if self.base.temperature is None:
            return weights
        # A factor common to the neighbours of an image changes no vote.
        exponent = (distances[:, :1].square() - distances.square()) / self.base.temperature
        return weights * exponent.exp()

    def _margin(self, features: Tensor, classes: Tensor) -> Tensor:
        """N, float64: the largest move of the feature that is found to change no vote, on the CPU."""
        k, count = self.base.k, self.rows.count
        near, found = self.rows.nearest(features.float(), min(k + _ROWS, count))
        vectors = self.rows.vectors(found).double()
        distances = (vectors - features[:, None]).norm(dim=2).cpu()
        distances, order = distances.sort(dim=1)
        found = found.cpu().gather(1, order)
        votes = self.rows.posteriors(found.to(near.device)).double().cpu()
        weights = self.rows.weights(found.to(near.device)).double().cpu()
        # Beyond this other rows come in, or all are in.
        reach = (distances[:, -1] - distances[:, k - 1]) / 2 if found.shape[1] < count else None
        low = torch.zeros(len(features), dtype=torch.float64)
        high = reach if reach is not None else torch.full_like(low, 2 * self.ball + float(distances.max()))
        leads = votes.gather(2, classes[:, None, None].expand(-1, votes.shape[1], 1)) - votes
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            stands = self._stands(distances, leads, weights, classes, middle)
            low, high = torch.where(stands, middle, low), torch.where(stands, high, middle)
        return torch.where(self._stands(distances, leads, weights, classes, torch.zeros_like(low)), low, 0.0)

    def _stands(self, distances: Tensor, leads: Tensor, weights: Tensor, classes: Tensor, move: Tensor) -> Tensor:
        """N: no feature at most ``move`` (N) away has another vote than the classes."""
        k, t = self.base.k, move[:, None]
        possible = distances - t <= distances[:, k - 1 : k] + t
        following = distances[:, k : k + 1] if distances.shape[1] > k else torch.full_like(t, torch.inf)
        certain = distances + t < following - t
        most = least = weights
        if self.base.temperature is not None:
            # A kernel lies between its values at both ends; up to a factor of each image's own.
            shift = distances[:, :1].square()
            near, far = (distances - t).clamp_min(0).square(), (distances + t).square()
            most = weights * ((shift - near) / self.base.temperature).exp()
            least = weights * ((shift - far) / self.base.temperature).exp()
        # What each row does for the class against each other one, at the worse end.
        worst = torch.minimum(most[..., None] * leads, least[..., None] * leads)
        held = (worst * certain[..., None]).sum(1)
        free = (k - certain.sum(1)).clamp_min(0)
        loose = torch.where((possible & ~certain)[..., None], worst, torch.inf).sort(dim=1).values[:, :k]
        taken = torch.arange(loose.shape[1])[None, :, None] < free[:, None, None]
        lead = held + torch.where(taken, loose, 0.0).sum(1)
        lead.scatter_(1, classes[:, None], torch.inf)
        # Where all weights may be 0 the rule is another one.
        weighed = (torch.where(certain, least, 0.0).sum(1) > 0) | ((least > 0) | ~possible).all(1)
        return (lead > _LEAD * most.amax(1, keepdim=True)).all(1) & weighed


class _AttackersMean(EvaluationOnly):
    """Images N x C x H x W -> the mean of their features under an attacker's own draws, N x d, with a gradient."""

    def __init__(self, defense: SmoothedFeatures, draws: int) -> None:
        super().__init__()
        self.defense, self.draws = defense, draws
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        noise = torch.randn((self.draws, *images.shape)).to(images)
        copies = (images + self.defense.sigma * noise).clamp(0, 1).flatten(0, 1)
        found = self.defense.inside(self.defense.features(copies))
        return found.view(self.draws, len(images), -1).mean(0)


def certify_smoothed_features(
    surface: RetrievalSurface,
    images: Tensor,
    *,
    sigma: float,
    draws: int = 10_000,
    alpha: float = 0.001,
    seed: int = 0,
    batch_size: int = 512,
) -> Certified:
    """Certify the vote of the K rows nearest to the mean feature under noise (:class:`SmoothedFeatures`), in l2.

    ``images`` are N x C x H x W in [0, 1]; ``surface``, ``sigma``, ``draws``, ``alpha``, ``seed``, ``batch_size`` and
    errors as for :class:`SmoothedFeatures`, whose ``certify`` this is.
    """
    smoothed = SmoothedFeatures(surface, sigma, draws=draws, seed=seed, batch_size=batch_size)
    return smoothed.certify(images, draws, alpha)
