"""The margin of the neighbour that decides: what an attack on a K-nearest vote raises, for one class at a time."""

from __future__ import annotations

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
    return Neighborhood.of(rows, near, filled, torch.ones_like(features[:, 0])), near


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
    weights = hood.log_weights.exp()
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


def rank_margin(surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, **settings: Any) -> Tensor:
    """Ascent on the margin of the neighbour that decides: ``target``, ``hot``, ``cold``, ``around`` and ``refresh`` as
    for :class:`RankMargin`; all else as for :func:`~nndefense.attacks.retrieval.ascent.attack`.
    """
    return attack(surface, x, y, RankMargin, eps=eps, **settings)
