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

The bounds are worked out in float64. What float32 may add in the defence itself, to the features and to the
difference of two squared distances, is a slack that a bound must exceed: 64 units in the last place of the squared
size of features and rows, and 8 times the rounding of features that is seen on the images. A proof is sound up to
that estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from nndefense.attacks.retrieval import RetrievalSurface
from nndefense.certificates.propagation import Bounded, LinearBounds
from nndefense.certificates.record import Certified
from nndefense.errors import InputError
from nndefense.features import FeatureExtractor
from nndefense.features.extractor import pooled, reduced

# Anchors beyond K; other rows that are looked at first, since most images that fail do there; rows that are
# compared at once; pairs of a batch.
_SPARE, _FIRST, _BLOCK, _PIECE, _CELLS = 3, 16, 1 << 14, 256, 1 << 23
# Units in the last place of float32, and shares of a vote nearer than which it may come out either way.
_ULP, _VOTE = 2.0**-24, 1e-5


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
    subject = _Retrieval(target, images) if isinstance(target, RetrievalSurface) else _Bare(target, images)
    radius = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    size = max(1, min(batch_size, subject.most))
    for numbers in torch.split(torch.arange(len(images), device=images.device), size):
        for budget in sorted(eps):
            if not len(numbers):
                break
            bounded = subject.bounds.over(images[numbers], budget, norm)
            numbers = numbers[subject.stands(bounded, numbers, steps)]
            radius[numbers] = budget
    return Certified(subject.prediction, radius, norm)


class _Bare:
    """A classifier: its own logit above every other."""

    @torch.no_grad()
    def __init__(self, net: nn.Module, images: Tensor) -> None:
        self.bounds = LinearBounds(net, images)
        logits = _in_parts(net, images)
        self.prediction, self.most = logits.argmax(1), len(images)
        self.error = float((logits[:_PIECE] - self.bounds(images[:_PIECE])).abs().max())

    def stands(self, bounded: Bounded, numbers: Tensor, steps: int) -> Tensor:
        """N: no other class can be the likeliest."""
        prediction, n, classes = self.prediction[numbers], len(numbers), bounded.low.shape[1]
        eye = torch.eye(classes, dtype=bounded.low.dtype, device=bounded.low.device)
        heads = (eye[prediction][:, None] - eye[None])[~eye[prediction].bool()].view(n, classes - 1, classes)
        owner = torch.arange(n, device=heads.device)[:, None].expand(-1, classes - 1)
        slack = 64 * _ULP * _size(bounded) + 16 * self.error
        least = bounded.least(heads.flatten(0, 1), owner.flatten()).view(n, -1)
        left = (least <= slack[:, None]) & (steps > 0)
        if bool(left.any()):
            least[left] = bounded.least(heads[left], owner[left], steps=steps)
        standing: Tensor = (least > slack[:, None]).all(1)
        return standing


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
        place: of the image in its batch.
        anchors, others: m and M row numbers.
        level: m x M: the difference of squared distances is this and what the head says.
        least: m x M, its best lower bound so far.
        slack: m x M, what that must exceed.
        lead, others_lead: m x (C - 1) and M x (C - 1), votes for the class less those for each other one.
        floor: what the sum of K leads must exceed.
        looked, tried: M and m x M: what is looked at now, and was bounded.
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
        self.slack, self.lead, self.others_lead, self.floor = slack, lead, others_lead, floor
        self.tried = torch.zeros_like(least, dtype=torch.bool)
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

    def next(self, k: int) -> tuple[Tensor, Tensor]:
        """The untried anchor of the highest bound for each other row that may be among the K, and that row's place."""
        if not len(self.anchors):
            return self.anchors, self.anchors
        waiting = ~self.proven & ~self.tried & self.looked & (self.proven.sum(0) < k)
        columns = waiting.any(0).nonzero()[:, 0]
        lines = torch.where(waiting, self.least, -torch.inf)[:, columns].argmax(0)
        self.tried[lines, columns] = True
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
        self.most = _CELLS // ((self.k + _SPARE) * rows.count)
        # Of vectors of length 1 the nearest are those of the largest product, which the length has no part in.
        self.unit = isinstance(features, FeatureExtractor) and features.spec.normalize
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
    def stands(self, bounded: Bounded, numbers: Tensor, steps: int) -> Tensor:
        """N: whichever rows can be the K nearest, they vote for the same class."""
        found = torch.zeros(len(numbers), dtype=torch.bool, device=numbers.device)
        length = _size(bounded)
        left = [self._pairs(bounded, place, int(number), length[place]) for place, number in enumerate(numbers)]
        # The other rows that are nearest to being among the K first: where these cannot be ruled out, nothing helps.
        for first in (_FIRST, None):
            for pairs in left:
                pairs.look_at(first)
            for effort in (0, steps) if steps else (0,):
                for pairs in left:
                    pairs.tried.zero_()
                for _ in range(self.k if effort else self.k + _SPARE):
                    standing = [pairs.stands(self.k, pairs.proven) for pairs in left]
                    found[[pairs.place for pairs, well in zip(left, standing, strict=True) if well]] = True
                    left = [pairs for pairs, well in zip(left, standing, strict=True) if not well]
                    self._refine(bounded, left, effort)
            left = [pairs for pairs in left if pairs.stands(self.k, pairs.proven | ~pairs.looked)]
        found[[pairs.place for pairs in left]] = True
        return found

    def _pairs(self, bounded: Bounded, place: int, number: int, length: Tensor) -> _Pairs:
        """The pairs of an image, bounded over the box of its feature."""
        y, scale = int(self.prediction[number]), float(self.weights.max())
        lead = self.weights[:, None] * (self.posteriors[:, y : y + 1] - self.posteriors)
        lead = torch.cat([lead[:, :y], lead[:, y + 1 :]], 1)
        own = (lead > _VOTE * scale).all(1)
        others, anchors = (~own).nonzero()[:, 0], own.nonzero()[:, 0]
        anchors = anchors[(self.vectors[anchors] - self.features[number]).norm(dim=1).argsort()[: self.k + _SPARE]]
        level = self.squares[others] - self.squares[anchors][:, None]
        if self.unit:
            # Times the length of the feature before it is scaled.
            slack = length * (self._slack(torch.ones_like(length)) + level.abs())
            level = torch.zeros_like(level)
        else:
            slack = self._slack(length).expand_as(level)
        middle, reach = (bounded.high + bounded.low)[place] / 2, (bounded.high - bounded.low)[place] / 2
        least = level + 2 * ((self.vectors[anchors] @ middle)[:, None] - self.vectors[others] @ middle)
        for line, anchor in zip(least, self.vectors[anchors], strict=True):
            for part, rows in zip(torch.split(line, _BLOCK), torch.split(others, _BLOCK), strict=True):
                part -= 2 * ((anchor - self.vectors[rows]).abs() @ reach)
        return _Pairs(place, anchors, others, level, least, slack, lead[anchors], lead[others], _VOTE * scale * self.k)

    def _refine(self, bounded: Bounded, left: Sequence[_Pairs], steps: int) -> None:
        """Bound one more pair of each other row that may still be among the K, that with the most hopeful anchor."""
        wanted = [(pairs, *pairs.next(self.k)) for pairs in left]
        for pairs, lines, columns in wanted:
            for mine, theirs in zip(torch.split(lines, _BLOCK), torch.split(columns, _BLOCK), strict=True):
                heads = 2 * (self.vectors[pairs.anchors[mine]] - self.vectors[pairs.others[theirs]])
                owner = torch.full_like(mine, pairs.place)
                better = bounded.least(heads, owner, steps=steps) + pairs.level[mine, theirs]
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
