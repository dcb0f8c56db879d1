"""Certificates by linear bound propagation: of the bare classifier, and of a vote of the K nearest rows.

A difference of squared distances to two rows is linear in the feature,

    d_j^2 - d_i^2 = 2 f(x) . (r_i - r_j) + |r_j|^2 - |r_i|^2,

so that each pair of rows is a linear head on the net, and a lower bound above 0 over the ball proves that row i is
nearer than row j to every image in it. Pairs are bounded of an *anchor*, one of the rows nearest to the image that
vote for its class, and any *other* row: by the box of the feature, then backward through the net, then with slopes of
their own, as far as the image needs it.

The K nearest rows hold with each other row j all the anchors D_j that are proven nearer. With t other rows among
them, and v the lead that a row's vote gives the class over another, their lead is at least

    min over t of the sum of the t least of { v_j + sum_{i in D_j} v_i / t : |D_j| <= K - t },

since the anchors with those of the best j are among the K, and have at least the mean. For K = 1 it says that each
other row has an anchor that is proven nearer.

What cannot be proven is left as soon as that shows. A few gradient steps within the ball meet images; a pair whose
order is another one at any of them has no proof, and an image whose answer needs such pairs is not bounded at all. The
other rows of which the least is known come first, since an image fails with one; and slopes are followed only as far
as what they gain can still be enough. All this loses proofs at most, and never makes one.

The bounds are worked out in float64. What float32 may add in the defence itself, to the features and to the
difference of two squared distances, is a slack that a bound must exceed: 64 units in the last place of the squared
size of features and rows, and 8 times the rounding of features that is seen on the images. A proof is sound up to
that estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from nndefense.attacks import norms
from nndefense.attacks.retrieval import RetrievalSurface
from nndefense.certificates.propagation import Ball, Bounded, LinearBounds
from nndefense.certificates.record import Certified
from nndefense.errors import InputError
from nndefense.features import FeatureExtractor
from nndefense.features.extractor import pooled, reduced

# Anchors beyond K; other rows that are looked at first, since most images that fail do there; rows that are
# compared at once; pairs of a batch.
_SPARE, _FIRST, _BLOCK, _PIECE, _CELLS = 3, 16, 1 << 14, 256, 1 << 23
# Steps within the ball, in units of its radius, on the way to images that cannot be proven to stand.
_STEPS = (1.0, 0.5, 0.5, 0.25)
# Units in the last place of float32, and shares of a vote nearer than which it may come out either way.
_ULP, _VOTE = 2.0**-24, 1e-5
# Farther than any row.
_FAR = 1e30


def certify_bounds(
    target: RetrievalSurface | nn.Module,
    images: Tensor,
    *,
    eps: Sequence[float],
    norm: str = "linf",
    steps: int = 8,
    batch_size: int = 8,
) -> Certified:
    """Prove for each image and budget, by linear bounds, that no image within it is classified otherwise.

    Args:
        target: a defence's surface at L3, with an exact index, whose answer is the vote of its K nearest rows with
            weights of their own; or a classifier, images -> logits N x C. The net may have the operations that
            :mod:`~nndefense.certificates.recording` knows.
        images: N x C x H x W in [0, 1].
        eps: the budgets; the radius of an image is the largest up to which all are proven.
        norm: ``linf`` or ``l2``.
        steps: of gradient ascent on the slopes of heads that are not proven without.
        batch_size: images that are bounded at once, at most.

    Raises:
        InputError: no budget, no image, another norm, or a target that cannot be bounded so.
    """
    if not eps or not len(images):
        raise InputError("linear bounds decide at given budgets: give at least one image and one eps (--eps)")
    subject: _Subject
    subject = _Retrieval(target, images) if isinstance(target, RetrievalSurface) else _Bare(target, images)
    subject.bounds.check_size()
    radius = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    size = max(1, min(batch_size, subject.most))
    for numbers in torch.split(torch.arange(len(images), device=images.device), size):
        for budget in sorted(eps):
            if not len(numbers):
                break
            numbers = numbers[subject.stands(images[numbers], numbers, budget, norm, steps)]
            radius[numbers] = budget
    return Certified(subject.prediction, radius, norm)


class _Subject(Protocol):
    """What is certified: its answers N, its bounds, and how many images are bounded at once at most."""

    prediction: Tensor
    bounds: LinearBounds
    most: int

    def stands(self, images: Tensor, numbers: Tensor, eps: float, norm: str, steps: int) -> Tensor:
        """Truth values N: it is proven that the images of these numbers are not answered otherwise within ``eps``."""


class _Bare:
    """A classifier: its own logit above every other."""

    @torch.no_grad()
    def __init__(self, net: nn.Module, images: Tensor) -> None:
        self.net, self.bounds = net, LinearBounds(net, images)
        logits = _in_parts(net, images)
        self.prediction, self.most = logits.argmax(1), len(images)
        self.error = float((logits[:_PIECE] - self.bounds(images[:_PIECE])).abs().max())
        self.unit = torch.eye(logits.shape[1], dtype=torch.float64, device=images.device)

    @torch.no_grad()
    def stands(self, images: Tensor, numbers: Tensor, eps: float, norm: str, steps: int) -> Tensor:
        """No other class can be the likeliest."""
        own = self.unit[self.prediction[numbers]]
        leads = (own[:, None] - self.unit)[~own.bool()].view(len(own), -1, own.shape[1])
        if not leads.shape[1]:
            return torch.ones_like(numbers, dtype=torch.bool)
        seen = _seen(self.net, lambda logits: (leads @ logits[..., None]).flatten(1).amin(1), images, eps, norm)
        standing = (leads @ seen[..., None] > 0).flatten(2).all(2).all(0)
        if not bool(standing.any()):
            return standing
        bounded, leads = self.bounds.over(images[standing], eps, norm), leads[standing]
        owner = torch.arange(len(leads), device=leads.device)[:, None].expand(leads.shape[:2])
        slack = (64 * _ULP * _size(bounded) + 16 * self.error)[:, None].expand(leads.shape[:2])
        least = bounded.least(leads.flatten(0, 1), owner.flatten()).view(slack.shape)
        # The class that is least ruled out first: where it cannot be, nothing else helps.
        alive = torch.ones_like(least[:, 0], dtype=torch.bool)
        for some in (least == least.amin(1, keepdim=True), torch.ones_like(least, dtype=torch.bool)):
            open_ = alive[:, None] & some & (least <= slack)
            if steps and bool(open_.any()):
                least[open_] = bounded.least(leads[open_], owner[open_], steps=steps, need=slack[open_])
            alive &= ~(some & (least <= slack)).any(1)
        return standing.masked_scatter(standing, alive)


def _seen(
    net: Callable[[Tensor], Tensor], lead: Callable[[Tensor], Tensor], images: Tensor, eps: float, norm: str
) -> Tensor:
    """What a net says (S x N x F) of a few images of each ball, on the way to where a lead, N x F -> N, is least."""
    Ball.of(images, eps, norm)
    radii = torch.full((len(images),), eps, dtype=images.dtype, device=images.device)
    into, found = norms.projector(images, radii, norm), []
    for step in (*_STEPS, 0.0):
        with torch.inference_mode(False), torch.enable_grad():
            images = images.clone().requires_grad_()
            output = net(images).to(images.device).double()
            found.append(output.detach())
            if not step or not output.requires_grad:
                break
            (slope,) = torch.autograd.grad(lead(output).sum(), images, allow_unused=True)
        if slope is None:
            break
        images = into(images.detach() - step * eps * norms.steepest(slope, norm))
    return torch.stack(found)


def _in_parts(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    parts = [function(part).to(images.device).double() for part in torch.split(images, _PIECE)]
    return torch.cat(parts)


def _size(bounded: Bounded) -> Tensor:
    """N: the largest length of the output in its box."""
    lengths: Tensor = torch.maximum(bounded.low.abs(), bounded.high.abs()).norm(dim=1)
    return lengths


class _Pairs:
    """Anchors and other rows of one image, and what is known of each pair.

    Attributes:
        place, owner: of the image in its batch, and among those that are bounded.
        anchors, others: m and M row numbers.
        level: m x M: the difference of squared distances is this and what the head says.
        least: m x M, its best lower bound so far.
        slack: m x M, what that must exceed.
        lead, others_lead: m x (C - 1) and M x (C - 1), votes for the class less those for each other one.
        floor: what the sum of K leads must exceed.
        possible: m x M: the anchor is nearer than the other row to every image that was seen.
        looked, tried: M and m x M: what is looked at now, and was bounded: 1 at once, 2 with slopes of its own.
    """

    def __init__(
        self,
        place: int,
        anchors: Tensor,
        others: Tensor,
        level: Tensor,
        least: Tensor,
        slack: Tensor,
        lead: Tensor,
        others_lead: Tensor,
        floor: float,
    ) -> None:
        self.place, self.anchors, self.others, self.level, self.least = place, anchors, others, level, least
        self.slack, self.lead, self.others_lead, self.floor, self.owner = slack, lead, others_lead, floor, place
        self.possible = torch.ones_like(least, dtype=torch.bool)
        self.tried = torch.zeros_like(least, dtype=torch.int8)
        self.looked = self.tried.any(0)

    @property
    def proven(self) -> Tensor:
        """m x M: the anchor is nearer than the other row to every image of the ball."""
        return self.least > self.slack

    def look_at(self, first: int | None) -> None:
        """Look at the first so many other rows, in the order of how little is known of them; None: at all."""
        self.looked = torch.ones_like(self.looked)
        if first is not None and len(self.anchors) and first < len(self.others):
            self.looked.zero_()
            self.looked[self.least.amax(0).topk(first, largest=False).indices] = True

    def next(self, k: int, effort: int) -> tuple[Tensor, Tensor]:
        """The untried anchor of the highest bound for each other row that may be among the K, and that row's place."""
        if not len(self.anchors):
            return self.anchors, self.anchors
        waiting = ~self.proven & self.possible & (self.tried < effort) & self.looked & (self.proven.sum(0) < k)
        columns = waiting.any(0).nonzero()[:, 0]
        lines = torch.where(waiting, self.least, -torch.inf)[:, columns].argmax(0)
        self.tried[lines, columns] = effort
        return lines, columns

    def stands(self, k: int, proven: Tensor) -> bool:
        """Whether the K nearest vote for the class whichever they are, given which pairs are proven."""
        count, gain = proven.sum(0), proven.to(self.lead).T @ self.lead
        for t in range(1, k + 1):
            allowed = count <= k - t
            if int(allowed.sum()) < t:
                continue
            worth = self.others_lead[allowed] + gain[allowed] / t
            if not bool((worth.topk(t, dim=0, largest=False).values.sum(0) > self.floor).all()):
                return False
        return True


class _Retrieval:
    """A vote of the K nearest rows."""

    @torch.no_grad()
    def __init__(self, surface: RetrievalSurface, images: Tensor) -> None:
        rows, features = surface.need_rows("the certificate"), surface.need_features("the certificate")
        if rows.overlap < 1:
            raise InputError("the certificate needs every row of the defence: make the surface at L3")
        if surface.smooth:
            raise InputError(
                "linear bounds certify a rule without a kernel and without a share of the classifier: use a defence "
                "without temperature and alpha, or certify by smoothing"
            )
        every = torch.arange(rows.count, device=images.device)
        self.k, self.vectors = surface.k, rows.vectors(every).double()
        self.posteriors, self.weights = rows.posteriors(every).double(), rows.weights(every).double()
        self.squares = self.vectors.square().sum(1)
        best, self.likeliest = self.posteriors.max(1)
        second = self.posteriors.scatter(1, self.likeliest[:, None], -torch.inf).amax(1)
        scale = float(self.weights.max())
        self.clear, self.floor = self.weights * (best - second) > _VOTE * scale, _VOTE * scale * self.k
        self.most = _CELLS // ((self.k + _SPARE) * rows.count)
        # Of vectors of length 1 the nearest are those of the largest product, which the length has no part in.
        self.unit = isinstance(features, FeatureExtractor) and features.spec.normalize
        self.net = features
        self.bounds = LinearBounds(_unscaled(features) if isinstance(features, FeatureExtractor) else features, images)
        answers = _in_parts(surface.predict, images)
        self.prediction = answers.argmax(1)
        found = _in_parts(features, images)
        exact = _in_parts(self.bounds, images)
        exact = exact / exact.norm(dim=1, keepdim=True).clamp_min(1e-12) if self.unit else exact
        self.error = float((found - exact).norm(dim=1).max())
        self.features = exact
        for part, answered in zip(torch.split(exact, _PIECE), torch.split(answers, _PIECE), strict=True):
            self._check_votes(part, answered)

    def _check_votes(self, features: Tensor, answers: Tensor) -> None:
        """The true pipeline answers as the rows say, where no rounding decides which rows are the nearest."""
        distances = torch.cdist(features, self.vectors).square()
        near, found = distances.topk(min(self.k + 1, len(self.vectors)), dim=1, largest=False)
        clear = torch.ones(len(near), dtype=torch.bool, device=near.device)
        if near.shape[1] > self.k:
            clear = near[:, self.k] - near[:, self.k - 1] > self._slack(features.norm(dim=1))
        found = found[:, : self.k]
        weights = self.weights[found]
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, torch.ones_like(weights))
        wanted = torch.einsum("nk,nkc->nc", weights / weights.sum(1, keepdim=True), self.posteriors[found])
        if bool(((wanted - answers.exp()).abs().amax(1) > 1e-4)[clear].any()):
            raise InputError(
                "linear bounds certify a vote of the K nearest rows, with weights of their own and an exact index, and "
                "this defence answers otherwise: certify by another method, such as smoothing"
            )

    def _slack(self, size: Tensor) -> Tensor:
        size = size + self.squares.max().sqrt()
        return 64 * _ULP * size**2 + 8 * size * self.error

    @torch.no_grad()
    def stands(self, images: Tensor, numbers: Tensor, eps: float, norm: str, steps: int) -> Tensor:
        """Whichever rows can be the K nearest, they vote for the same class."""
        found = torch.zeros(len(numbers), dtype=torch.bool, device=numbers.device)
        own = torch.stack([self._own(int(number)) for number in numbers])

        def lead(features: Tensor) -> Tensor:
            near = 2 * features @ self.vectors.T - self.squares
            mine, theirs = (near.masked_fill(rows, -_FAR).topk(self.k, dim=1).values.sum(1) for rows in (~own, own))
            return mine - theirs

        seen = _seen(self.net, lead, images, eps, norm)
        left = [self._pairs(place, int(number), seen[:, place]) for place, number in enumerate(numbers)]
        left = [pairs for pairs in left if pairs.stands(self.k, pairs.possible)]
        if not left:
            return found
        bounded = self.bounds.over(images[[pairs.place for pairs in left]], eps, norm)
        for owner, pairs in enumerate(left):
            self._enclose(bounded, owner, pairs)
        # The other rows that are nearest to being among the K first: where these cannot be ruled out, nothing helps.
        for first in (self.k, _FIRST, None):
            for pairs in left:
                pairs.look_at(first)
            for effort in (0, steps) if steps else (0,):
                for _ in range(self.k if effort else self.k + _SPARE):
                    standing = [pairs.stands(self.k, pairs.proven) for pairs in left]
                    found[[pairs.place for pairs, well in zip(left, standing, strict=True) if well]] = True
                    left = [pairs for pairs, well in zip(left, standing, strict=True) if not well]
                    self._refine(bounded, left, effort)
            left = [pairs for pairs in left if pairs.stands(self.k, pairs.proven | ~pairs.looked)]
        found[[pairs.place for pairs in left]] = True
        return found

    def _own(self, number: int) -> Tensor:
        """The rows that vote for the class of an image above every other."""
        own: Tensor = self.clear & (self.likeliest == self.prediction[number])
        return own

    def _pairs(self, place: int, number: int, seen: Tensor) -> _Pairs:
        """The pairs of an image, and which of them have their order at all the features S x F that were seen."""
        y, own = int(self.prediction[number]), self._own(number)
        lead = self.weights[:, None] * (self.posteriors[:, y : y + 1] - self.posteriors)
        lead = torch.cat([lead[:, :y], lead[:, y + 1 :]], 1)
        others, anchors = (~own).nonzero()[:, 0], own.nonzero()[:, 0]
        anchors = anchors[(self.vectors[anchors] - self.features[number]).norm(dim=1).argsort()[: self.k + _SPARE]]
        level = self.squares[others] - self.squares[anchors][:, None]
        pairs = _Pairs(
            place, anchors, others, level, torch.full_like(level, -torch.inf), torch.zeros_like(level), lead[anchors],
            lead[others], self.floor,
        )  # fmt: skip
        near = 2 * self.vectors @ seen.T - self.squares[:, None]
        for one in near.T:
            pairs.possible &= one[anchors][:, None] > one[others]
        return pairs

    def _enclose(self, bounded: Bounded, owner: int, pairs: _Pairs) -> None:
        """Bound the pairs of the image that has this number among the bounded ones over the box of its feature."""
        pairs.owner, length = owner, _size(bounded)[owner]
        if self.unit:
            # Times the length of the feature before it is scaled.
            pairs.slack = length * (self._slack(torch.ones_like(length)) + pairs.level.abs())
            pairs.level = torch.zeros_like(pairs.level)
        else:
            pairs.slack = self._slack(length).expand_as(pairs.level)
        middle, reach = (bounded.high + bounded.low)[owner] / 2, (bounded.high - bounded.low)[owner] / 2
        anchors = self.vectors[pairs.anchors]
        pairs.least = pairs.level + 2 * ((anchors @ middle)[:, None] - self.vectors[pairs.others] @ middle)
        for line, anchor in zip(pairs.least, anchors, strict=True):
            for part, rows in zip(torch.split(line, _BLOCK), torch.split(pairs.others, _BLOCK), strict=True):
                part -= 2 * ((anchor - self.vectors[rows]).abs() @ reach)

    def _refine(self, bounded: Bounded, left: Sequence[_Pairs], steps: int) -> None:
        """Bound one more pair of each other row that may still be among the K, that with the most hopeful anchor."""
        wanted = [(pairs, *pairs.next(self.k, 1 + (steps > 0))) for pairs in left]
        for pairs, lines, columns in wanted:
            for mine, theirs in zip(torch.split(lines, _BLOCK), torch.split(columns, _BLOCK), strict=True):
                heads = 2 * (self.vectors[pairs.anchors[mine]] - self.vectors[pairs.others[theirs]])
                owner, level = torch.full_like(mine, pairs.owner), pairs.level[mine, theirs]
                better = level + bounded.least(heads, owner, steps=steps, need=pairs.slack[mine, theirs] - level)
                pairs.least[mine, theirs] = torch.maximum(pairs.least[mine, theirs], better)


def _unscaled(extractor: FeatureExtractor) -> nn.Module:
    """The extractor without the scaling to length 1 at its end."""
    return _Unscaled(extractor) if extractor.spec.normalize else extractor


class _Unscaled(nn.Module):
    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__()
        self.extractor, self.spec = extractor, replace(extractor.spec, normalize=False)

    def forward(self, images: Tensor) -> Tensor:
        vectors = pooled(self.extractor.truncated(images), self.spec, self.extractor.layout)
        return reduced(vectors, self.spec, self.extractor.pca)
