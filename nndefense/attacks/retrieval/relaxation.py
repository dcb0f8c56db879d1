"""A retrieval that can be differentiated: the soft top-K of an image's neighbourhood, and losses on its logarithm.

The defence answers ``p = sum_k w_k s_k / sum_k w_k`` over the K nearest rows; w_k and s_k are constants of the rows,
so all of the gradient flows through who belongs to the K; where the defence has a kernel ``exp(-d_k^2 / T)`` on the
weights, through that as well. Relaxation R1 (ours, after the advice of Tramer et al., NeurIPS 2020, to attack the
decisive part itself) gives every row near the image a membership

    a_j = sigmoid((tau - d_j) / T),   tau = halfway between the K-th and the next distance, held fixed,

and R3 (straight-through) takes the hard answer forward and R1's gradient backward. As T goes to 0, R1 becomes the
hard top-K, where a softmax of -d^2 / T would become 1-NN. Everything is kept in logarithms: a row far outside the
K-ball then still pulls, with slope 1/T, where its plain membership would be 0 and its gradient too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nndefense.attacks.retrieval.surface import Rows

_TINY = 1e-30
# The logarithm of a weight of 0: any other outweighs it, whatever the kernel makes of it, and alone it counts.
_SILENT = -1e4


@dataclass
class Neighborhood:
    """The rows around N images that a relaxation looks at: fixed until they are retrieved again.

    Attributes:
        vectors: N x m x d.
        log_weights: N x m, logarithm of the weights; minus infinity for a place that is not filled.
        log_posteriors: N x m x C.
        classes: N x m, the class that each row is predicted as.
        spread: N, the scale of the temperatures, a distance.
        lengths: N x m, the vectors' squared lengths.
        cooling: N, 1/T of the defence's kernel; None where it has none.
        sole: whether each row votes for its class alone.
    """

    vectors: Tensor
    log_weights: Tensor
    log_posteriors: Tensor
    classes: Tensor
    spread: Tensor
    lengths: Tensor
    cooling: Tensor | None = None
    sole: bool = False

    @classmethod
    def of(cls, rows: Rows, near: Tensor, filled: Tensor, spread: Tensor) -> Neighborhood:
        """Row numbers N x m, those that ``filled`` (N x m) tells to be there."""
        posteriors = rows.posteriors(near)
        # The defence falls back on the plain mean only where all K weights are 0; a floor does the same in the limit.
        weights = rows.weights(near)
        log_weights = weights.clamp_min(_TINY).log().masked_fill(weights == 0, _SILENT).masked_fill(~filled, -torch.inf)
        vectors, logs = rows.vectors(near), posteriors.clamp_min(_TINY).log()
        if rows.temperature is not None:
            # A narrow kernel makes weights smaller than the floor, and where nobody else votes they count.
            logs = logs.masked_fill(posteriors == 0, _SILENT)
        # Large as 1/T may be, its products with squared distances stay finite.
        cooling = None if rows.temperature is None else torch.full_like(spread, min(1 / rows.temperature, 1e28))
        sole = bool((posteriors.count_nonzero(2) == 1).all())
        return cls(vectors, log_weights, logs, posteriors.argmax(2), spread, vectors.square().sum(2), cooling, sole)

    def __getitem__(self, index: Tensor) -> Neighborhood:
        """The neighbourhoods of some of the images."""
        held = {name: part for name, part in vars(self).items() if isinstance(part, Tensor)}
        parts: dict[str, Any] = {name: part[index] for name, part in held.items()}
        return replace(self, **parts)

    def distances(self, features: Tensor) -> Tensor:
        """Euclidean distances of features N x d to their own rows: N x m, infinite where no row is."""
        # Products instead of differences: no N x m x d array has to be made and kept for the gradient. Rounding below
        # a thousandth of the nearest distances does not matter to a loss that the true pipeline checks.
        own = features.square().sum(1, keepdim=True)
        cross = torch.bmm(self.vectors, features.unsqueeze(2)).squeeze(2)
        squared = own - 2 * cross + self.lengths
        # The root's slope is infinite at 0.
        distances = squared.clamp_min(1e-12).sqrt()
        return distances.masked_fill(torch.isneginf(self.log_weights), torch.inf)

    def log_votes(self, distances: Tensor) -> Tensor:
        """Logarithm of the weights times the kernel at distances N x m, up to a constant of each image: N x m."""
        if self.cooling is None:
            return self.log_weights
        filled = torch.isfinite(distances)
        squared = torch.where(filled, distances, 0.0).square()
        nearest = squared.detach().masked_fill(~filled, torch.inf).amin(1, keepdim=True)
        return self.log_weights - (squared - nearest) * self.cooling.unsqueeze(1)

    def log_answer(self, log_weights: Tensor, places: Tensor | None = None) -> Tensor:
        """Log-probabilities N x C of the rows at ``places`` (N x p; None: all), with log weights N x p or N x m."""
        shares = log_weights - log_weights.logsumexp(1, keepdim=True)
        if self.sole:
            classes = self.classes if places is None else self.classes.gather(1, places)
            found = log_sums(shares, classes, self.log_posteriors.shape[2])
            # No gradient leads away from a class without a vote or to it.
            return found.masked_fill(torch.isneginf(found), math.log(_TINY) if self.cooling is None else _SILENT)
        logs = self.log_posteriors
        if places is not None:
            logs = logs.gather(1, places.unsqueeze(2).expand(-1, -1, logs.shape[2]))
        return torch.logsumexp(shares.unsqueeze(2) + logs, 1)


def log_sums(log_weights: Tensor, classes: Tensor, count: int) -> Tensor:
    """Logarithm of the summed weights of each class: N x m and class numbers N x m -> N x ``count``; -inf for none."""
    top = log_weights.new_full((len(log_weights), count), -torch.inf)
    top = top.scatter_reduce(1, classes, log_weights.detach(), "amax")
    none = torch.isneginf(top)
    top = top.masked_fill(none, 0)
    sums = torch.zeros_like(top).scatter_add(1, classes, (log_weights - top.gather(1, classes)).exp())
    return (sums.masked_fill(none, 1).log() + top).masked_fill(none, -torch.inf)


@torch.no_grad()
def retrieve(rows: Rows, features: Tensor, y: Tensor, k: int, *, m: int, others: int) -> Neighborhood:
    """Gather the m nearest rows of features N x d and the ``others`` nearest that are not predicted as y.

    The second part is what a gradient needs where the m nearest are all of the true class. The spread is the width of
    the shell that holds the m nearest.
    """
    m, others = min(max(m, k + 1), rows.count), min(others, rows.count)
    distances, near = rows.nearest(features, m)
    filled = torch.isfinite(distances)
    spread = (distances[:, -1] - distances[:, 0]).clamp_min(1e-6)
    if others:
        far, strange = rows.nearest(features, others, but=y)
        known = (strange.unsqueeze(2) == near.unsqueeze(1)).any(2)
        near, filled = torch.cat([near, strange], 1), torch.cat([filled, torch.isfinite(far) & ~known], 1)
    return Neighborhood.of(rows, near, filled, spread)


def threshold(distances: Tensor, k: int) -> Tensor:
    """tau: halfway between the K-th and the next distance, held fixed. N x m -> N x 1."""
    nearest = distances.detach().topk(min(k + 1, distances.shape[1]), dim=1, largest=False).values
    # With K rows or fewer in all, everything is inside.
    beyond = torch.where(torch.isfinite(nearest), nearest, 0.0).amax(1, keepdim=True) + 1.0
    if nearest.shape[1] <= k:
        return beyond
    inside, after = nearest[:, k - 1 : k], nearest[:, k : k + 1]
    return torch.where(torch.isfinite(after), (inside + after) / 2, beyond)


def soft_log_probabilities(
    hood: Neighborhood, features: Tensor, k: int, temperature: Tensor | float, *, distances: Tensor | None = None
) -> Tensor:
    """The relaxed defence R1: features N x d -> log-probabilities N x C, differentiable in the features.

    Args:
        hood: the rows around the images.
        features: N x d.
        k: the defence's K.
        temperature: T as a multiple of each neighbourhood's spread, one number or N.
        distances: ``hood.distances(features)``, where they are there already.
    """
    distances = hood.distances(features) if distances is None else distances
    tau = threshold(distances, k)
    width = (torch.as_tensor(temperature, dtype=features.dtype, device=features.device) * hood.spread).unsqueeze(1)
    # Unfilled places: their weight of 0 takes them out; a finite distance keeps NaN out of the gradient.
    finite = torch.where(torch.isfinite(distances), distances, tau)
    return hood.log_answer(F.logsigmoid((tau - finite) / width) + hood.log_votes(distances))


@torch.no_grad()
def hard_log_probabilities(hood: Neighborhood, distances: Tensor, k: int) -> Tensor:
    """The defence's own rule on the rows that are here: distances N x m -> log-probabilities N x C."""
    nearest = distances.topk(min(k, distances.shape[1]), dim=1, largest=False).indices
    return hood.log_answer(hood.log_votes(distances).gather(1, nearest), nearest)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """R3: the hard log-probabilities' values with the soft ones' gradient, both N x C."""
    return hard.detach() + (soft - soft.detach())


def mixed(log_p: Tensor, own: Tensor, alpha: float) -> Tensor:
    """``log((1 - alpha) exp(log_p) + alpha exp(own))``, N x C each: the neighbours' answer and the classifier's."""
    if not 0 < alpha < 1:
        return own if alpha else log_p
    return torch.logaddexp(log_p + math.log1p(-alpha), own + math.log(alpha))


def towards(log_p: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """``log p_t - log p_y`` for targets t: N x C, N and N -> N, above 0 where the target beats the true class."""
    found: Tensor = (log_p.gather(1, target[:, None]) - log_p.gather(1, y[:, None]))[:, 0]
    return found
