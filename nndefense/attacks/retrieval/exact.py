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
- The nodes part the sets among them: what holds a row is looked at before what does not hold it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nndefense.attacks import norms
from nndefense.attacks.door import float32_alone
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


@float32_alone
@torch.no_grad()
def run_exact(
    surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, norm: str = "l2", limit: int = 10_000
) -> ExactResult:
    """Decide for every image whether any image inside ball and box is misclassified.

    Args:
        surface: with all rows (L3); its feature must be affine in the pixels, its index exact, and its weights those of
            the rows alone.
        x, y, eps, norm: as for :func:`~nndefense.attacks.retrieval.ascent.attack`.
        limit: nodes for each image, at least 1; what needs more stays open. Ten thousand take some 5 s.

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
    """Raise the :class:`InputError` that :func:`run_exact` would, for a surface and one or more of the images ``x``."""
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

    def leads(self, rows: Tensor, y: Tensor) -> Tensor:
        """By how much the likeliest other class leads y (N classes), N."""
        found = self.probabilities(rows)
        own = found.gather(1, y[:, None])
        return found.scatter(1, y[:, None], -torch.inf).amax(1) - own[:, 0]


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


@dataclass(frozen=True)
class _Node:
    """All sets of K rows that hold ``rows`` and none of ``out``; the nodes of an image never share a set."""

    rows: tuple[int, ...]
    out: Tensor


@dataclass
class _Image:
    """What is left to do for one image."""

    number: int
    y: int
    roles: _Roles
    fresh: Iterator[list[_Node]]
    limit: int
    pending: list[_Node] = field(default_factory=list)
    narrow: bool = False

    def push(self, nodes: list[_Node]) -> None:
        """Nodes to look at; those beyond the limit are not, so that the image can be broken but not certified."""
        self.pending += reversed(nodes[: self.limit])
        if len(nodes) > self.limit:
            self.narrow, self.fresh = True, iter(())
        self.limit -= min(len(nodes), self.limit)

    def take(self, count: int) -> list[_Node]:
        """The next few of them: children before their parents' neighbours, the likeliest first."""
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
        if surface.smooth:
            raise InputError(
                "the exact accuracy takes neither a kernel nor a share of the classifier: leave them out "
                "(--temperature inf --alpha 0)"
            )
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
        self.values = self.planes.at(center)
        self._check_votes(rows)
        self.images, self.broken = x.clone(), surface.fooled(x, problem.y).cpu()
        self.certified = torch.zeros_like(self.broken)
        self.nodes = torch.zeros(len(x), dtype=torch.int64)

    def _check_votes(self, rows: Rows) -> None:
        """The true pipeline answers as the rows say, where no rounding decides which rows are the nearest."""
        near, found = self.values.topk(min(self.k + 1, rows.count), dim=1, largest=False)
        clear = torch.ones(len(near), dtype=torch.bool, device=near.device)
        if near.shape[1] > self.k:
            clear = near[:, self.k] - near[:, self.k - 1] > 2 * self.slack
        wanted = self.votes.probabilities(found[:, : self.k])
        answered = self.problem.surface.predict(self.problem.x).cpu().double().exp()
        if float((wanted - answered).abs().amax(1)[clear].sum()) > 1e-4 * max(int(clear.sum()), 1):
            raise InputError(
                "the exact accuracy needs answers that are the vote of the K nearest rows, with weights that depend on "
                "the row alone and an exact index, and this defence answers otherwise: take a defence of that kind"
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
                batch += [(image, node) for node in taken]
            for first in range(0, len(batch), room):
                self._bound(batch[first : first + room])
            left = [
                image for image in {id(image): image for image, _ in batch}.values() if not self.broken[image.number]
            ]
            share = min(2 * share, _SHARE)

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _starts(self, number: int, roles: _Roles) -> Iterator[list[_Node]]:
        """The sets of the first ``least`` other rows, in an order with the likeliest first, that half-spaces leave."""
        values = self.values[number]
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
            if sets.shape[1] == self.k:
                sets = sets[self.votes.leads(other[sets], self.y[number].expand(len(sets))) >= -_VOTE]
            # They are the first: no other row of a place between (or before, where none is left to add) is in the set.
            whole = sets.shape[1] == roles.least
            if len(sets):
                yield [
                    _Node(tuple(other[places].tolist()), other[0 if whole else int(places[-1]) : last])
                    for places in sets
                ]

    def _bound(self, batch: list[tuple[_Image, _Node]]) -> None:
        """Bound nodes of several images, and give each what follows."""
        numbers = torch.tensor([image.number for image, _ in batch])
        self.nodes += torch.bincount(numbers, minlength=len(self.nodes))
        inside = torch.tensor([(*node.rows, *node.rows[:1] * (self.k - len(node.rows))) for _, node in batch])
        outside = torch.stack([image.roles.own | (len(node.rows) == self.k) for image, node in batch])
        for line, (_, node) in zip(outside, batch, strict=True):
            line[node.out] = True
        outside.scatter_(1, inside, False)
        found = decide(self.planes, self.region.take(numbers), inside, outside, self.slack)
        met = found.met.nonzero()[:, 0]
        if len(met):
            self._candidates(batch, met, inside, outside)
        for place, (image, node) in enumerate(batch):
            if self.broken[image.number]:
                continue
            if not found.empty[place] and (len(node.rows) == self.k or not found.met[place]):
                image.narrow = True
            elif len(node.rows) < self.k:
                # A set that is empty unless one of a few own rows is in it, too; or met, but where the vote is right.
                more = found.support[place] if found.empty[place] else torch.ones_like(image.roles.own)
                image.push(self._grown(image, node, more))

    def _candidates(self, batch: list[tuple[_Image, _Node]], met: Tensor, inside: Tensor, outside: Tensor) -> None:
        """Show the true pipeline points a hair inside the polyhedra that meet their regions."""
        numbers = torch.tensor([batch[place][0].number for place in met.tolist()])
        # Float32 can carry a point over the sphere by a few units in the last place.
        region = self.region.take(numbers)
        tight = replace(region, limit=region.limit * (1.0 - 1e-6) ** 2) if not self.linf else region
        found = decide(self.planes, tight, inside[met], outside[met], -1.5 * self.slack)
        near, sets = self.planes.at(found.points).topk(min(self.k + 2, len(self.planes.level)), dim=1, largest=False)
        near = torch.nn.functional.pad(near, (1, 2), value=torch.inf)
        near[:, 0] = -torch.inf
        # Rounding may put the next row in the place of the K-th, and then that vote must be wrong, too.
        last, after = near[:, self.k], near[:, self.k + 1]
        swapped = after - last <= self.slack
        several = (near[:, self.k + 2] - last <= self.slack) | (after - near[:, self.k - 1] <= self.slack)
        other = torch.cat([sets[:, : self.k - 1], sets[:, self.k :][:, :1]], 1) if sets.shape[1] > self.k else sets
        sets, ys = sets[:, : self.k], self.y[numbers]
        leads, others = self.votes.leads(sets, ys), self.votes.leads(other, ys)
        wrong = (leads > _VOTE) & (~swapped | (~several & (others > _VOTE)))
        index = (found.met & wrong).nonzero()[:, 0]
        if not len(index):
            return
        numbers = numbers[index]
        part = self.problem.take(numbers.to(self.images.device))
        images = norms.projector(part.x, part.radii, part.norm)(found.points[index].to(part.x).view_as(part.x))
        fooled = part.surface.fooled(images, part.y)
        self.images[numbers.to(images.device)[fooled]] = images[fooled]
        self.broken[numbers[fooled.cpu()]] = True

    def _grown(self, image: _Image, node: _Node, more: Tensor) -> list[_Node]:
        """The node with each row of ``more`` (R truth values) that half-spaces and the vote leave, likeliest first."""
        values = self.values[image.number]
        free, held = more.clone(), list(node.rows)
        free[node.out], free[held] = False, False
        spare = self.k - image.roles.least - int(image.roles.own[held].sum())
        if spare <= 0:
            free &= ~image.roles.own
        left = image.roles.own.clone()
        left[held] = False
        own, rest = left.nonzero()[:, 0], free.nonzero()[:, 0]
        own = own[values[own].argsort()[: 2 * _FIRST]]
        spare = min(spare, self.k - len(held) - 1)
        if len(own) > spare and len(rest):
            apart = gaps(self.planes, values, rest, own, slack=self.slack, linf=self.linf)
            moves = apart.topk(spare + 1, dim=1).values[:, -1]
            order = moves.argsort(stable=True)
            rest = rest[order[moves[order] <= float(self.radii[image.number])]]
        if len(held) + 1 == self.k and len(rest):
            sets = torch.cat([torch.tensor(held).expand(len(rest), -1), rest[:, None]], 1)
            rest = rest[self.votes.leads(sets, self.y[image.number].expand(len(sets))) >= -_VOTE]
            # Of a whole set all other rows are outside.
            return [_Node((*node.rows, row), node.out) for row in rest.tolist()]
        return [
            _Node((*node.rows, row), torch.cat([node.out, rest[:place]])) for place, row in enumerate(rest.tolist())
        ]
