"""The margin of the neighbour that decides: what an attack on a K-nearest vote raises, for one class at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nndefense.attacks.losses import margin
from nndefense.attacks.retrieval import relaxation
from nndefense.attacks.retrieval.ascent import Objective, Problem, Raised, attack
from nndefense.attacks.retrieval.relaxation import Neighborhood
from nndefense.attacks.retrieval.surface import RetrievalSurface, Rows
from nndefense.errors import InputError

_TINY = 1e-12


class RankMargin(Objective):
    """``D_{K - m + 1}(rows not of t) - D_m(rows of t)``, above 0 where class t has the majority of the K nearest rows.

    D_j is the j-th smallest *squared* distance of a side, and m the fewest rows of t that outweigh the K - m nearest
    others: t wins where its m-th row comes before the other side's (K - m + 1)-th. With equal weights and odd K both
    ranks are (K + 1) / 2. A margin of the nearest row's membership (R1) is silent about the row that decides, where
    others of its class are inside already. Raised is a smooth form, a mean of the squared distances around each of the
    two rows with weights ``exp(-|d - D_j| / T)``, whose gradient is a difference of rows and does not vanish; T falls
    geometrically from ``hot`` to ``cold`` times the image's own gap. Ours, after the advice of Tramer et al. (NeurIPS
    2020) to attack the decisive part itself; compare Sitawarin and Wagner (arXiv 2003.06559), whose hinge has no rank.

    Args:
        surface: L1 with rows, L2 or L3.
        target: N classes to aim at; where it is y itself, any class but y; default y.
        gap: N, the clean image's margin without its sign, the scale of the temperatures; default: measured.
        hot, cold: first and last temperature, in gaps.
        around: rows beyond K + 1 that are looked at on each side.
        refresh: steps between two retrievals.
    """

    state = ("hood", "y", "target", "gap")
    hood: Neighborhood

    def __init__(
        self,
        surface: RetrievalSurface,
        *,
        target: Tensor | None = None,
        gap: Tensor | None = None,
        hot: float = 0.2,
        cold: float = 0.002,
        around: int = 30,
        refresh: int = 15,
    ) -> None:
        if not 0 < cold <= hot:
            raise InputError(f"the temperatures go from {hot} to {cold}, but must fall and stay above 0")
        self.rows, self.k = surface.need_rows("the rank margin"), surface.k
        self.target, self.gap, self.hot, self.cold = target, gap, hot, cold
        self.around, self.refresh = around, refresh

    def renew(self, problem: Problem, features: Tensor) -> None:
        """Retrieve both sides again."""
        self.y = problem.y
        self.target = problem.y if self.target is None else self.target
        if self.gap is None:
            clean = problem.clean_features()
            hood, _ = sides(self.rows, clean, self.target, self.k, self.around)
            self.gap = margins(hood, hood.distances(clean), self.target, self.y, self.k)[0].abs()
        self.hood, _ = sides(self.rows, features, self.target, self.k, self.around)

    def value(self, images: Tensor, features: Tensor, progress: float) -> Raised:
        """The smooth margin, and the plain one as its score."""
        assert self.target is not None
        assert self.gap is not None
        distances = self.hood.distances(features)
        temperature = self.gap.clamp_min(_TINY) * self.hot * (self.cold / self.hot) ** progress
        score, raised = margins(self.hood, distances, self.target, self.y, self.k, temperature)
        hard = relaxation.hard_log_probabilities(self.hood, distances.detach(), self.k)
        return Raised(raised, score, margin(hard, self.y) > 0)


@torch.no_grad()
def sides(rows: Rows, features: Tensor, target: Tensor, k: int, around: int = 30) -> tuple[Neighborhood, Tensor]:
    """The m rows of class ``target`` (N) nearest to features N x d, and then as many of all other classes.

    m is ``around`` and K + 1 or K + 2. Also their numbers, N x 2m, nearest first on each side; where a side has fewer
    rows its nearest is repeated.
    """
    count = min(2 * (k // 2 + 1) + around, rows.count)
    own, rest = rows.nearest(features, count, of=target), rows.nearest(features, count, but=target)
    near = torch.cat([torch.where(torch.isfinite(far), found, found[:, :1]) for far, found in (own, rest)], 1)
    filled = torch.isfinite(torch.cat([own[0], rest[0]], 1))
    hood = Neighborhood.of(rows, near, filled, torch.ones_like(features[:, 0]))
    hood.spread = _spread(torch.cat([own[0], rest[0]], 1), k)
    return hood, near


def margins(
    hood: Neighborhood, distances: Tensor, target: Tensor, y: Tensor, k: int, temperature: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The margin of :class:`RankMargin` for each of N images, and its smooth form, which has a gradient.

    Args:
        hood: of :func:`sides`, m rows a side.
        distances: N x 2m, of the features to it.
        target, y: N classes; where they are equal the margin is that of any other class.
        k: the defence's K.
        temperature: N, squared distances; None: the second is the first.
    """
    half, swapped = distances.shape[1] // 2, (target == y).unsqueeze(1)
    logs = hood.log_votes(distances.detach())
    weights = logs.exp() if hood.cooling is None else (logs - logs.amax(1, keepdim=True)).exp()
    sides = [(distances[:, part], weights[:, part]) for part in (slice(0, half), slice(half, None))]
    # Any class but y: the rows not of y are to come nearer, and those of y to go.
    pull, push = (
        tuple(torch.where(swapped, other, one) for one, other in zip(here, there, strict=True))
        for here, there in (sides, sides[::-1])
    )
    first, second = _ranks(pull, push, k)
    nearer, farther = _decisive(pull[0], first, temperature), _decisive(push[0], second, temperature)
    return farther[0] - nearer[0], farther[1] - nearer[1]


_Side = tuple[Tensor, ...]


def _ranks(pull: _Side, push: _Side, k: int) -> tuple[Tensor, Tensor]:
    """Places (from 0) of the decisive row of each side, N x 1: m - 1 and K - m.

    Sides are distances and weights, N x h each. Where not even all K rows would do, as many as there are stand for m.
    """
    ours, theirs = (
        F.pad(weights.gather(1, distances.detach().argsort(1)).cumsum(1), (1, 0)) for distances, weights in (pull, push)
    )
    tips = ours[:, 1 : k + 1] > theirs[:, :k].flip(1)
    there = torch.isfinite(pull[0]).sum(1).clamp(1, k)
    m = torch.where(tips.any(1), tips.int().argmax(1) + 1, there)
    m = torch.minimum(m, there).unsqueeze(1)
    return m - 1, k - m


def _decisive(distances: Tensor, place: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    """The squared distance of the row at a place of the order, N, infinite where none is there; and its smooth form."""
    filled = torch.isfinite(distances)
    squared = torch.where(filled, distances, 0.0).square()
    fixed = torch.where(filled, squared.detach(), torch.inf)
    ordered = fixed.sort(1).values
    there = ordered.gather(1, place.clamp_max(ordered.shape[1] - 1))
    if temperature is None:
        return there[:, 0], there[:, 0]
    # Rows much farther out than the one that decides have no say, however warm it is.
    limit = ordered.gather(1, (2 * place + 5).clamp_max(ordered.shape[1] - 1))
    closeness = -(fixed - there).abs() / temperature.unsqueeze(1)
    shares = closeness.masked_fill(~filled | (fixed > limit), -torch.inf).softmax(1)
    return there[:, 0], (shares * squared).sum(1)


class AnswerMargin(Objective):
    """``log p_t - log p_y`` of the defence's own answer, for one that a kernel or the classifier makes smooth.

    The neighbours' part is the soft top-K of :mod:`~nndefense.attacks.retrieval.relaxation` over the rows of t and of
    the other classes that are nearest, whose memberships sharpen from ``hot`` to ``cold`` times the neighbourhood's
    spread; a kernel is no narrower than that either, since beyond it far rows would not pull. At first each row votes
    for its own class alone, and the classifier's logarithm is averaged with the neighbours': the logarithm of a sum
    follows whatever is ahead in it, and would be silent about the rest. More and more it becomes the true answer's.
    Ours.

    Args:
        surface: L1 with rows, L2 or L3.
        target: N classes to aim at; where it is y itself, any class but y; default y.
        hot, cold: first and last temperature of the memberships, in spreads.
        around: rows beyond K + 1 that are looked at on each side.
        refresh: steps between two retrievals.
        share: of the classifier; default the defence's.
    """

    state = ("hood", "y", "target", "shell")
    hood: Neighborhood
    shell: Tensor

    def __init__(
        self,
        surface: RetrievalSurface,
        *,
        target: Tensor | None = None,
        hot: float = 0.2,
        cold: float = 0.02,
        around: int = 30,
        refresh: int = 10,
        share: float | None = None,
    ) -> None:
        if not 0 < cold <= hot:
            raise InputError(f"the temperatures go from {hot} to {cold}, but must fall and stay above 0")
        self.rows, self.k, self.target = surface.need_rows("the answer's margin"), surface.k, target
        self.alpha = surface.alpha if share is None else share
        self.classify = surface.need_classifier("the answer's margin") if self.alpha else None
        self.hot, self.cold, self.around, self.refresh = hot, cold, around, refresh

    def renew(self, problem: Problem, features: Tensor) -> None:
        """Retrieve both sides again."""
        self.y = problem.y
        self.target = problem.y if self.target is None else self.target
        spread = self.hood.spread if hasattr(self, "hood") else None
        self.hood, _ = sides(self.rows, features, self.target, self.k, self.around)
        # One scale for the whole run, so that the annealing alone moves the temperature.
        if spread is None:
            self.shell = shell_of(self.hood, features)
        else:
            self.hood.spread = spread

    def value(self, images: Tensor, features: Tensor, progress: float) -> Raised:
        """The margin, its value at the coldest temperature as a score."""
        assert self.target is not None
        distances = self.hood.distances(features)
        heat = self.hot * (self.cold / self.hot) ** progress
        own = None if self.classify is None else self.classify(images).log_softmax(1)
        near = distances.detach()
        cold = _soft(self.hood, near, self.k, self.cold, self.shell)
        answer = relaxation.hard_log_probabilities(self.hood, near, self.k)
        if own is not None:
            cold, answer = (relaxation.mixed(log_p, own.detach(), self.alpha) for log_p in (cold, answer))
        raised = _lead(self._raised(distances, own, heat, min(2 * progress, 1.0)), self.y, self.target)
        return Raised(raised, _lead(cold, self.y, self.target), margin(answer, self.y) > 0)

    def _raised(self, distances: Tensor, own: Tensor | None, heat: float, truth: float) -> Tensor:
        """Logarithms of the answer, N x C: as it is at ``truth`` 1; at 0 by rows' classes, the classifier apart."""
        log_p = _soft(self.hood, distances, self.k, heat, self.shell)
        found = log_p if own is None else relaxation.mixed(log_p, own, self.alpha)
        if truth < 1:
            apart = _soft(replace(self.hood, sole=True), distances, self.k, heat, self.shell)
            apart = apart if own is None else (1 - self.alpha) * apart + self.alpha * own
            found = torch.lerp(apart, found, truth)
        return found


def _soft(hood: Neighborhood, distances: Tensor, k: int, heat: float, shell: Tensor) -> Tensor:
    """The soft top-K over distances N x m, with a kernel of at least ``heat`` shells: N x C."""
    if hood.cooling is not None:
        hood = replace(hood, cooling=torch.minimum(hood.cooling, 1 / (heat * shell)))
    return relaxation.soft_log_probabilities(hood, distances, k, heat, distances=distances)


def shell_of(hood: Neighborhood, features: Tensor) -> Tensor:
    """By how much the nearest rows' squared distances differ, N: those of the shell that has ``hood.spread``."""
    nearest = hood.distances(features).amin(1)
    return ((nearest + hood.spread).square() - nearest.square()).clamp_min(1e-6)


def answer_margins(
    surface: RetrievalSurface, hood: Neighborhood, images: Tensor, features: Tensor, target: Tensor, y: Tensor
) -> Tensor:
    """The score of :class:`AnswerMargin` for N images with features N x d, around which ``hood`` lies: N."""
    log_p = _soft(hood, hood.distances(features), surface.k, 0.02, shell_of(hood, features.detach()))
    if surface.alpha:
        own = surface.need_classifier("the answer's margin")(images).log_softmax(1)
        log_p = relaxation.mixed(log_p, own, surface.alpha)
    return _lead(log_p, y, target)


def _lead(log_p: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """By how much the target leads y, or where they are equal the best other class: N."""
    return torch.where(target == y, margin(log_p, y), relaxation.towards(log_p, y, target))


def _spread(distances: Tensor, k: int) -> Tensor:
    """The width of the shell that holds the nearest few of N x m rows, N: at least K + 1 of them, and 32."""
    near = distances.topk(min(max(k + 1, 32), distances.shape[1]), dim=1, largest=False).values
    last = torch.where(torch.isfinite(near), near, 0.0).amax(1)
    return (last - near[:, 0]).clamp_min(1e-6)


def rank_margin(surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, **settings: Any) -> Tensor:
    """Ascent on the margin of the neighbour that decides: ``target``, ``hot``, ``cold``, ``around`` and ``refresh`` as
    for :class:`RankMargin`; ``surface``, ``x``, ``y``, ``eps`` and other ``settings`` as for
    :func:`~nndefense.attacks.retrieval.ascent.attack`.
    """
    return attack(surface, x, y, RankMargin, eps=eps, **settings)
