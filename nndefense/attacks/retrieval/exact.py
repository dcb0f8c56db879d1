"""The exact robust accuracy of a retrieval defence whose feature is affine in the pixels, by branch and bound.

The defence's answer depends on the set S of the K nearest rows. Where S is the nearest, ``g_i(x) <= g_j(x)`` for all i
in S and j outside, with g affine (:mod:`~nndefense.attacks.retrieval.polyhedra`). An image stands if and only if no set
whose vote is another class has a polyhedron that meets ball and box. Sets are grown row by row:

- Rows split by class into *own* rows, which vote for y so clearly that any set with a wrong vote has at least p others,
  and these others; p = ceil(K / 2) where posteriors are nearly one-hot. The split is a bound that holds for the given
  posteriors and weights, whatever they are.
- A set of p others is a node. At most K - p own rows may be as near: half-spaces rule most nodes out at once.
- The node's quadratic programme demands that no own row be nearer. A proof that it misses the ball rests on a few own
  rows; every set that it leaves open holds one of these, so that they are the children.
- Where it meets the ball, the true vote at the point decides; where that is right, each further row is a child.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nndefense.attacks import norms
from nndefense.attacks.retrieval import ascent
from nndefense.attacks.retrieval.affine import affine_feature
from nndefense.attacks.retrieval.polyhedra import Planes, Region, gaps
from nndefense.attacks.retrieval.programme import decide
from nndefense.attacks.retrieval.surface import Counts, Knowledge, RetrievalSurface, Rows
from nndefense.errors import InputError

# Own rows that half-spaces are tried with first and last, nodes of an image in a round, numbers in the largest tensors.
_FIRST, _OWN, _SHARE, _ROOM = 16, 256, 32, 1 << 22
# Probabilities nearer than this may come out either way in float32.
_VOTE = 1e-6


@dataclass(frozen=True)
class ExactResult:
    """What is true of each of N images.

    Attributes:
        images: N x C x H x W: an image inside ball and box that the true pipeline misclassifies, else the clean one.
        broken: N: such an image was found.
        certified: N: it is proven that there is none. Where neither holds the image is open: a limit was reached, or
            the rounding of float32 decides.
        nodes: N, quadratic programmes that were bounded.
        slack: what rounding is allowed to add to the difference of two squared distances: an image is certified where
            no wrong set comes within it of being the nearest, and a point is looked for that much inside of one.
        counts: what was asked of the defence.
        seconds: wall time.
    """

    images: Tensor
    broken: Tensor
    certified: Tensor
    nodes: Tensor
    slack: float
    counts: Counts
    seconds: float

    @property
    def open(self) -> Tensor:
        """N: neither broken nor certified."""
        return ~self.broken & ~self.certified


@torch.no_grad()
def run_exact(
    surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, norm: str = "l2", limit: int = 5_000
) -> ExactResult:
    """Decide for every image whether any image inside ball and box is misclassified.

    Args:
        surface: with all rows (L3); its feature must be affine in the pixels, its index exact, and its weights those of
            the rows alone.
        x, y, eps, norm: as for :func:`~nndefense.attacks.retrieval.ascent.attack`.
        limit: nodes for each image, at least 1; what needs more stays open. Two thousand take about 0.3 s.

    Raises:
        InputError: no image, a feature that is not affine, a defence whose answer is not the vote of its K nearest rows
            with weights of their own, or images, labels or settings that cannot be used.
    """
    begun = time.perf_counter()
    problem = ascent.pose(surface, x, y, eps, norm, steps=limit)
    before = Counts(**vars(surface.counts))
    search = _Search(problem, limit)
    search.run()
    spent = Counts(**{name: count - getattr(before, name) for name, count in vars(surface.counts).items()})
    broken, certified, nodes = (part.to(x.device) for part in (search.broken, search.certified, search.nodes))
    return ExactResult(search.images, broken, certified, nodes, search.slack, spent, time.perf_counter() - begun)


def check_exact(surface: RetrievalSurface, x: Tensor) -> None:
    """Raise the :class:`InputError` that :func:`run_exact` would, for a surface and one or more of the images."""
    _Search(ascent.pose(surface, x, torch.zeros(len(x), dtype=torch.int64), 0.0, "l2"), 1)


@dataclass(frozen=True)
class _Votes:
    """The rule of the defence: ``argmax_c sum_k w_k s_kc / sum_k w_k``; where all weights are 0, the plain mean."""

    posteriors: Tensor
    weights: Tensor

    def probabilities(self, rows: Tensor) -> Tensor:
        """Sets of rows N x K -> N x C."""
        weights = self.weights[rows]
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, torch.ones_like(weights))
        return torch.einsum("nk,nkc->nc", weights / weights.sum(1, keepdim=True), self.posteriors[rows])

    def leads(self, rows: Tensor, y: int) -> Tensor:
        """By how much the likeliest other class leads y, N."""
        found = self.probabilities(rows)
        own = found[:, y].clone()
        found[:, y] = -torch.inf
        return found.amax(1) - own


@dataclass(frozen=True)
class _Roles:
    """For a class y: which rows are its own, and how many others every set with a wrong vote has at least."""

    own: Tensor
    least: int

    @staticmethod
    def of(votes: _Votes, y: int, k: int) -> _Roles:
        # The most that a row can do for another class against y.
        margins = votes.posteriors - votes.posteriors[:, y : y + 1]
        margins[:, y] = -torch.inf
        best = votes.weights * margins.amax(1)
        most, against = float(best.max().clamp_min(0)), int((best < 0).sum())
        for least in range((k + 1) // 2, 0, -1):
            # With fewer than `least` others the sum over K rows stays below 0.
            own = best < -(least - 1) * most / (k - least + 1) - k * _VOTE
            if least == 1 or int(own.sum()) >= 0.75 * against:
                break
        return _Roles(own, least)


@dataclass
class _Image:
    """What is left to do for one image."""

    number: int
    y: int
    roles: _Roles
    fresh: Iterator[list[tuple[int, ...]]]
    limit: int
    pending: list[tuple[int, ...]] = field(default_factory=list)
    seen: set[tuple[int, ...]] = field(default_factory=set)
    narrow: bool = False

    def push(self, sets: list[tuple[int, ...]]) -> None:
        """Sets to look at; those beyond the limit are not, so that the image can be broken but not certified."""
        for rows in sets:
            if rows in self.seen:
                continue
            if len(self.seen) >= self.limit:
                self.narrow, self.fresh = True, iter(())
                return
            self.seen.add(rows)
            self.pending.append(rows)

    def take(self, count: int) -> list[tuple[int, ...]]:
        """The next few of them."""
        while len(self.pending) < count and (block := next(self.fresh, None)) is not None:
            self.push(block)
        taken, self.pending = self.pending[-count:], self.pending[:-count]
        return taken


class _Search:
    """The branch and bound over all images together."""

    def __init__(self, problem: ascent.Problem, limit: int) -> None:
        surface = problem.surface
        rows, features = surface.need_rows("the exact accuracy"), surface.need_features("the exact accuracy")
        if not len(problem.x):
            raise InputError("the exact accuracy needs at least one image")
        if surface.knowledge is not Knowledge.WHITE or rows.overlap < 1:
            raise InputError("the exact accuracy needs every row of the defence: make the surface at L3")
        self.problem, self.limit, self.k = problem, limit, surface.k
        # The search itself is at home on the CPU, wherever the defence is.
        x, radii, self.y = problem.x, problem.radii.cpu().double(), problem.y.cpu()
        every = torch.arange(rows.count, device=x.device)
        told = (call(every).cpu().double() for call in (rows.vectors, rows.posteriors, rows.weights))
        vectors, *rule = told
        self.votes, feature = _Votes(*rule), affine_feature(features, x)
        self.planes = Planes.of(feature.matrix, feature.offset, vectors)
        self.linf, self.radii = problem.norm == "linf", radii
        center = x.cpu().flatten(1).double()
        reach = radii[:, None] if self.linf else torch.inf
        low, high = (center - reach).clamp_min(0), (center + reach).clamp_max(1)
        # No point is farther than the farthest corner, and in linf the ball is a box itself.
        limits = torch.maximum(high - center, center - low).square().sum(1) / 2
        if not self.linf:
            limits = torch.minimum(limits, radii.square() / 2)
        self.region = Region(center, low, high, limits)
        # What float32 may add to the difference of two squared distances: rounding of sums of products, and of the
        # features.
        size = float(vectors.norm(dim=1).max() + feature(x).norm(dim=1).max())
        self.slack = 64 * 2.0**-24 * size**2 + 8 * size * feature.error
        self._check_votes(rows)
        self.images, self.broken = x.clone(), surface.fooled(x, problem.y).cpu()
        self.certified = torch.zeros_like(self.broken)
        self.nodes = torch.zeros(len(x), dtype=torch.int64)

    def _check_votes(self, rows: Rows) -> None:
        """The true pipeline answers as the rows say, where no rounding decides which rows are the nearest."""
        values = self.planes.at(self.region.center)
        near, found = values.topk(min(self.k + 1, rows.count), dim=1, largest=False)
        clear = torch.ones(len(near), dtype=torch.bool, device=near.device)
        if near.shape[1] > self.k:
            clear = near[:, self.k] - near[:, self.k - 1] > 2 * self.slack
        wanted = self.votes.probabilities(found[:, : self.k])
        answered = self.problem.surface.predict(self.problem.x).cpu().double().exp()
        if float((wanted - answered).abs().amax(1)[clear].sum()) > 1e-4 * max(int(clear.sum()), 1):
            raise InputError(
                "the exact accuracy needs answers that are the vote of the K nearest rows, with weights that depend on "
                "the row alone and an exact index: these are not, so leave --exact out"
            )

    def run(self) -> None:
        roles = {y: _Roles.of(self.votes, y, self.k) for y in set(self.y.tolist())}
        left = []
        for number in (~self.broken).nonzero()[:, 0].tolist():
            y = int(self.y[number])
            left.append(_Image(number, y, roles[y], self._starts(number, roles[y]), self.limit))
        share, room = 4, max(_ROOM // max(self.planes.slope.shape), 1)
        while left:
            batch = []
            for image in left:
                taken = image.take(share)
                # Nothing is left to look at.
                self.certified[image.number] = not taken and not image.narrow
                batch += [(image, rows) for rows in taken]
            for first in range(0, len(batch), room):
                self._bound(batch[first : first + room])
            left = [
                image for image in {id(image): image for image, _ in batch}.values() if not self.broken[image.number]
            ]
            share = min(2 * share, _SHARE)

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _starts(self, number: int, roles: _Roles) -> Iterator[list[tuple[int, ...]]]:
        """Sets of ``least`` rows that are not y's own, those that half-spaces leave, nearly the likeliest first."""
        values = self.planes.at(self.region.center[number][None])[0]
        own, other = roles.own.nonzero()[:, 0], (~roles.own).nonzero()[:, 0]
        own = own[values[own].argsort()]
        spare = self.k - roles.least
        radius = float(self.radii[number])

        def needed(distances: Tensor) -> Tensor:
            """The least move that brings all but the spare own rows outside: ... x own -> ...; 0 for too few rows."""
            if distances.shape[-1] <= spare:
                return distances.new_zeros(distances.shape[:-1])
            return distances.topk(spare + 1, dim=-1).values[..., -1]

        # The nearest few own rows rule most others out; then all that are tried.
        for count in (_FIRST + spare, _OWN):
            apart = gaps(self.planes, values, other, own[:count], slack=self.slack, linf=self.linf)
            moves = needed(apart)
            order = moves.argsort(stable=True)
            order = order[moves[order] <= radius]
            other, apart = other[order], apart[order]
        for last in range(roles.least - 1, len(other)):
            sets, distances = torch.tensor([[last]], device=other.device), apart[last][None]
            for _ in range(roles.least - 1):
                # Too many sets to be looked at: smaller ones are nodes as well, which the search grows itself.
                if len(sets) * last * apart.shape[1] > _ROOM:
                    break
                first, row = (torch.arange(len(other), device=other.device) < sets[:, -1:]).nonzero().unbind(1)
                grown = torch.maximum(distances[first], apart[row])
                kept = needed(grown) <= radius
                sets, distances = torch.cat([sets[first], row[:, None]], 1)[kept], grown[kept]
            sets = other[sets]
            if sets.shape[1] == self.k:
                sets = sets[self.votes.leads(sets, int(self.y[number])) >= -_VOTE]
            if len(sets):
                yield [tuple(sorted(rows)) for rows in sets.tolist()]

    def _bound(self, batch: list[tuple[_Image, tuple[int, ...]]]) -> None:
        """Bound nodes of several images, and give each what follows."""
        numbers = torch.tensor([image.number for image, _ in batch])
        self.nodes += torch.bincount(numbers, minlength=len(self.nodes))
        inside = torch.tensor([(*rows, *rows[:1] * (self.k - len(rows))) for _, rows in batch])
        own = {image.y: image.roles.own for image, _ in batch}
        outside = torch.stack([own[image.y] | (len(rows) == self.k) for image, rows in batch])
        outside.scatter_(1, inside, False)
        found = decide(self.planes, self.region.take(numbers), inside, outside, self.slack)
        met = found.met.nonzero()[:, 0]
        if len(met):
            self._candidates(batch, met, inside, outside)
        for place, (image, rows) in enumerate(batch):
            if self.broken[image.number]:
                continue
            if found.empty[place]:
                image.push(self._with_own(image, rows, found.support[place]))
            elif len(rows) == self.k or not found.met[place]:
                image.narrow = True
            else:
                image.push(self._with_any(image, rows))

    def _candidates(
        self, batch: list[tuple[_Image, tuple[int, ...]]], met: Tensor, inside: Tensor, outside: Tensor
    ) -> None:
        """Show the true pipeline points a hair inside the polyhedra that meet their regions."""
        numbers = torch.tensor([batch[place][0].number for place in met.tolist()])
        # Float32 can carry a point over the sphere by a few units in the last place.
        region = self.region.take(numbers)
        tight = replace(region, limit=region.limit * (1.0 - 1e-6) ** 2) if not self.linf else region
        found = decide(self.planes, tight, inside[met], outside[met], -self.slack)
        sets = self.planes.at(found.points).topk(self.k, dim=1, largest=False).indices
        leads = torch.stack(
            [self.votes.leads(rows[None], batch[place][0].y)[0] for place, rows in zip(met.tolist(), sets, strict=True)]
        )
        index = (found.met & (leads > 0)).nonzero()[:, 0]
        if not len(index):
            return
        numbers = numbers[index]
        part = self.problem.take(numbers.to(self.images.device))
        images = norms.projector(part.x, part.radii, part.norm)(found.points[index].to(part.x).view_as(part.x))
        fooled = part.surface.fooled(images, part.y)
        self.images[numbers.to(images.device)[fooled]] = images[fooled]
        self.broken[numbers[fooled.cpu()]] = True

    def _with_own(self, image: _Image, rows: tuple[int, ...], support: Tensor) -> list[tuple[int, ...]]:
        """A set that is empty unless one of a few own rows is in it, too: with each of these."""
        if len(rows) == self.k:
            return []
        return self._possible(image, rows, support.nonzero()[:, 0])

    def _with_any(self, image: _Image, rows: tuple[int, ...]) -> list[tuple[int, ...]]:
        """A set that is met, but where the vote is right: with every further row that half-spaces leave."""
        values = self.planes.at(self.region.center[image.number][None])[0]
        free = torch.ones_like(image.roles.own)
        free[list(rows)] = False
        own, rest = (image.roles.own & free).nonzero()[:, 0], free.nonzero()[:, 0]
        own = own[values[own].argsort()[:_OWN]]
        held = int(image.roles.own[list(rows)].sum())
        spare = min(self.k - image.roles.least - held, self.k - len(rows) - 1)
        if len(own) > spare:
            apart = gaps(self.planes, values, rest, own, slack=self.slack, linf=self.linf)
            rest = rest[apart.topk(spare + 1, dim=1).values[:, -1] <= float(self.radii[image.number])]
        return self._possible(image, rows, rest)

    def _possible(self, image: _Image, rows: tuple[int, ...], more: Tensor) -> list[tuple[int, ...]]:
        """The set with one row more, without those whose vote is right."""
        if int(image.roles.own[list(rows)].sum()) >= self.k - image.roles.least:
            more = more[~image.roles.own[more]]
        if len(rows) + 1 == self.k and len(more):
            sets = torch.cat([torch.tensor(rows, device=more.device).expand(len(more), -1), more[:, None]], 1)
            more = more[self.votes.leads(sets, image.y) >= -_VOTE]
        return [tuple(sorted((*rows, row))) for row in more.tolist()]
