"""The margin of the neighbour that decides: what an attack on a K-nearest vote raises, for one class at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nndefense.attacks.losses import margin
from nndefense.attacks.retrieval import relaxation
from nndefense.attacks.retrieval.ascent import Objective, Problem, Raised, attack
from nndefense.attacks.retrieval.relaxation import Neighborhood
from nndefense.attacks.retrieval.surface import RetrievalSurface, Rows
from nndefense.errors import InputError

_TINY = 1e-12


class RankMargin(Objective):
    """``m_t = D_q(rows not of t) - D_q(rows of t)``, above 0 where class t has the majority of the K nearest rows.

    D_q is the *squared* distance to the row that tips the vote: the first, from the nearest outwards, with which rows
    of its side have more than half of the K nearest rows' weight; of equal weights the q-th, q = ceil((K + 1) / 2).
    A margin of the nearest row's membership (R1) is silent about the row that decides, where K - 1 of the right ones
    are inside already. Raised is a smooth form, a mean of the squared distances around that row with weights
    ``exp(-|d - D_q| / T)``, whose gradient is a difference of rows and does not vanish; T falls geometrically from
    ``hot`` to ``cold`` times the image's own gap. Ours, after the advice of Tramer et al. (NeurIPS 2020) to attack the
    decisive part itself; compare Sitawarin and Wagner (arXiv 2003.06559), whose hinge has no rank.

    Args:
        surface: L1 with rows, L2 or L3.
        target: N classes to aim at; where it is y itself, any class but y; default y.
        gap: N, the clean image's ``|m_t|``, the scale of the temperatures; default: measured.
        hot, cold: first and last temperature, in gaps.
        around: rows beyond rank 2q that are looked at on each side.
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
            hood = sides(self.rows, clean, self.target, self.k, self.around)
            self.gap = margins(hood, hood.distances(clean), self.target, self.y, self.k)[0].abs()
        self.hood = sides(self.rows, features, self.target, self.k, self.around)

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
def sides(rows: Rows, features: Tensor, target: Tensor, k: int, around: int = 30) -> Neighborhood:
    """The rows of class ``target`` (N) nearest to features N x d, and then as many of all other classes."""
    count = min(2 * (k // 2 + 1) + around, rows.count)
    own, rest = rows.nearest(features, count, of=target), rows.nearest(features, count, but=target)
    filled = torch.isfinite(torch.cat([own[0], rest[0]], 1))
    return Neighborhood.of(rows, torch.cat([own[1], rest[1]], 1), filled, torch.ones_like(features[:, 0]))


def margins(
    hood: Neighborhood, distances: Tensor, target: Tensor, y: Tensor, k: int, temperature: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """m_t of :class:`RankMargin` for each of N images, and its smooth form, which has a gradient.

    Args:
        hood: of :func:`sides`, m rows a side.
        distances: N x 2m, of the features to it.
        target, y: N classes; where they are equal the margin is that of any other class.
        k: the defence's K.
        temperature: N, squared distances; None: the second is the first.
    """
    half = distances.shape[1] // 2
    # Half of the weight that the K nearest rows have together: more of it decides.
    nearest = distances.detach().topk(min(k, distances.shape[1]), dim=1, largest=False).indices
    weights = hood.log_weights.exp()
    tip = weights.gather(1, nearest).sum(1, keepdim=True) / 2
    own, rest = (
        _decisive(distances[:, part], weights[:, part], tip, temperature)
        for part in (slice(0, half), slice(half, None))
    )
    sign = torch.where(target == y, -1.0, 1.0)
    return sign * (rest[0] - own[0]), sign * (rest[1] - own[1])


def _decisive(distances: Tensor, weights: Tensor, tip: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    """The squared distance of the row with which a side's weight passes ``tip``, N, infinite where there is no row;
    and its smooth form."""
    filled = torch.isfinite(distances)
    squared = torch.where(filled, distances, 0.0).square()
    fixed = torch.where(filled, squared.detach(), torch.inf)
    ordered, order = fixed.sort(1)
    passed = weights.gather(1, order).cumsum(1) > tip
    place = torch.where(passed.any(1), passed.int().argmax(1), filled.sum(1) - 1).clamp_min(0).unsqueeze(1)
    there = ordered.gather(1, place)
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
