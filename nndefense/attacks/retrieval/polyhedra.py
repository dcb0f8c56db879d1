"""Polyhedra of nearest rows under an affine feature: which of them meet a ball and the box, many at a time.

With a feature ``f(x) = A x + b`` the squared distance to row j, less ``|f(x)|^2``, is affine in the pixels:
``g_j(x) = -2 v_j . (A x + b) + |v_j|^2``. That rows ``i`` of a set are nearer than rows ``o`` outside of it is
``g_i(x) <= g_o(x)``: a polyhedron. Its point nearest to ``x0`` within ``low <= x <= high`` is a quadratic programme
``min 1/2 |x - x0|^2`` with ``B x <= c``, and of it *any* ``m >= 0`` gives a proven lower bound by weak duality:
``D(m) = 1/2 |x(m) - x0|^2 + m . (B x(m) - c)``, with ``x(m) = clamp(x0 - B^T m, low, high)``. Where D is above half the
squared radius the polyhedron misses the ball, whatever the rounding of the ascent that found m.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

# Rounds of cuts, Newton steps in each, and cuts that a polyhedron is given in a round.
_ROUNDS, _NEWTON, _CUTS = 24, 3, 2
# Rows that are compared with others at once.
_PIECE = 4096


@dataclass(frozen=True)
class Planes:
    """The affine functions ``g_j(x) = slope_j . x + level_j`` of all rows, float64: R x d and R."""

    slope: Tensor
    level: Tensor

    @cached_property
    def squares(self) -> Tensor:
        """R: of the slopes' lengths."""
        return self.slope.square().sum(1)

    @staticmethod
    def of(matrix: Tensor, offset: Tensor, vectors: Tensor) -> Planes:
        """Those of rows R x F under the feature ``matrix x + offset``, F x d and F."""
        return Planes(-2 * vectors @ matrix, -2 * vectors @ offset + vectors.square().sum(1))

    def at(self, points: Tensor) -> Tensor:
        """Points N x d -> the values N x R: squared distances less the feature's own squared length."""
        return torch.addmm(self.level, points, self.slope.T)


@dataclass(frozen=True)
class Region:
    """Where each of N images may be moved: ``low <= x <= high`` (N x d) and ``1/2 |x - x0|^2 <= limit`` (N)."""

    center: Tensor
    low: Tensor
    high: Tensor
    limit: Tensor

    def take(self, index: Tensor) -> Region:
        """Those of some of the images."""
        return Region(*(getattr(self, field.name)[index] for field in fields(self)))


@dataclass(frozen=True)
class Settled:
    """What became of N polyhedra.

    Attributes:
        empty: N: proven to miss the region.
        met: N: ``points`` lie in both. Where neither holds the ascent has not decided.
        points: N x d, the best found.
        support: N x R: the rows outside whose constraints carry the proof of ``empty``.
    """

    empty: Tensor
    met: Tensor
    points: Tensor
    support: Tensor


def gaps(planes: Planes, values: Tensor, near: Tensor, far: Tensor, *, slack: float, linf: bool) -> Tensor:
    """How far a point is from having each row of ``near`` as near as each of ``far``: A and B rows -> A x B.

    The signed distance to a half-space in l2 (or linf), without regard to the box.

    Args:
        planes: of all rows.
        values: R, those of the point.
        near, far: row numbers A and B.
        slack: how much farther the one may be than the other.
        linf: the norm.
    """
    second = planes.slope[far]
    if linf:
        # The dual norm of linf is l1.
        sizes = [torch.cdist(planes.slope[part], second, p=1) for part in torch.split(near, _PIECE)]
    else:
        products = torch.cat([planes.slope[part] @ second.T for part in torch.split(near, _PIECE)])
        sizes = [(planes.squares[near, None] + planes.squares[far] - 2 * products).clamp_min(0).sqrt()]
    size = torch.cat(sizes)
    return (values[near, None] - values[None, far] - slack) / size.clamp_min(1e-9)


def settle(planes: Planes, region: Region, inside: Tensor, outside: Tensor, slack: float) -> Settled:
    """Decide for N polyhedra whether they meet their regions.

    Args:
        planes: of all rows.
        region: of N images.
        inside: N x k rows that are to be nearer than all of ``outside``; repeat one where there are fewer.
        outside: N x R truth values.
        slack: added to the right of every constraint; above 0 it makes the polyhedra larger (for proofs), below 0
            smaller (for points that rounding cannot move out).
    """
    return _Ascent(planes, region, inside, outside, slack).run()


class _Ascent:
    """Projected Newton ascent on the duals of N quadratic programmes, to which violated constraints are added."""

    def __init__(self, planes: Planes, region: Region, inside: Tensor, outside: Tensor, slack: float) -> None:
        self.planes, self.region, self.inside, self.outside, self.slack = planes, region, inside, outside, slack
        n, d = region.center.shape
        new = region.center.new_zeros
        self.normal, self.offset, self.weight = new(n, 0, d), new(n, 0), new(n, 0)
        self.rows = inside.new_zeros(n, 0, 2)
        self.active = torch.arange(n, device=inside.device)
        self.points = region.center.clone()
        self.empty, self.met = (torch.zeros(n, dtype=torch.bool, device=inside.device) for _ in range(2))
        self.support = torch.zeros_like(outside)

    def run(self) -> Settled:
        for _ in range(_ROUNDS):
            self._cut()
            if not len(self.active):
                break
            for _ in range(_NEWTON):
                self._newton()
            self._prune()
        self._cut()
        return Settled(self.empty, self.met, self.points, self.support)

    def _point(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """x(m) and D(m) of weights N x M."""
        region = self.region
        moved = region.center - torch.einsum("nm,nmd->nd", weight, self.normal)
        points = torch.minimum(torch.maximum(moved, region.low), region.high)
        excess = torch.einsum("nmd,nd->nm", self.normal, points) - self.offset
        return points, (points - region.center).square().sum(1) / 2 + (weight * excess).sum(1)

    def _newton(self) -> None:
        """One semismooth Newton step on the duals, the best of several lengths; a gradient step where none is better.

        D is concave and piecewise quadratic: its Hessian is ``-B F B^T`` with F the pixels that the box does not hold.
        """
        region, weight = self.region, self.weight
        moved = region.center - torch.einsum("nm,nmd->nd", weight, self.normal)
        free = ((moved > region.low) & (moved < region.high)).to(moved)
        points = torch.minimum(torch.maximum(moved, region.low), region.high)
        slope = torch.einsum("nmd,nd->nm", self.normal, points) - self.offset
        used = (weight > 0) | (slope > 0)
        hessian = torch.einsum("nmd,nkd->nmk", self.normal * free[:, None], self.normal)
        hessian = hessian * (used[:, :, None] & used[:, None])
        # A unit for what is not used, and a little for directions in which the box leaves nothing.
        hessian.diagonal(dim1=1, dim2=2).add_((~used).to(moved) + 1e-9)
        step = torch.linalg.solve(hessian, slope * used)
        _, best = self._point(weight)
        chosen = weight
        lengths = (1.0, 0.5, 0.1)
        for trial in (*(weight + length * step for length in lengths), weight + slope / max(weight.shape[1], 1)):
            trial = trial.clamp_min(0)
            _, value = self._point(trial)
            better = value > best
            chosen, best = torch.where(better[:, None], trial, chosen), torch.where(better, value, best)
        self.weight = chosen

    def _prune(self) -> None:
        """Leave those that are proven to be empty."""
        _, value = self._point(self.weight)
        empty = value > self.region.limit
        if empty.any():
            place = self.active[empty]
            self.empty[place] = True
            carries = (self.weight > 0)[empty].nonzero()
            self.support[place[carries[:, 0]], self.rows[empty][carries[:, 0], carries[:, 1], 1]] = True
            self._keep(~empty)

    def _cut(self) -> None:
        """Leave those whose point is found to lie in both; give the others the constraints that it violates most."""
        if not len(self.active):
            return
        points, _ = self._point(self.weight)
        self.points[self.active] = points
        values = self.planes.at(points)
        nearer, place = values.gather(1, self.inside).max(1)
        least, rows = values.masked_fill(~self.outside, torch.inf).topk(min(_CUTS, values.shape[1]), 1, largest=False)
        # A quarter of the slack is left to what the ascent has not settled.
        within = (points - self.region.center).square().sum(1) / 2 <= self.region.limit
        met = (nearer - least[:, 0] <= self.slack + abs(self.slack) / 4) & within
        self.met[self.active[met]] = True
        first = self.inside.gather(1, place[:, None]).expand_as(rows)
        pairs = torch.stack([first, rows], 2)
        known = (pairs[:, :, None] == self.rows[:, None]).all(3).any(2) if self.rows.shape[1] else pairs[..., 0] < 0
        wanted = (nearer[:, None] - least > self.slack) & ~known & ~met[:, None] & torch.isfinite(least)
        if met.any():
            self._keep(~met)
            pairs, wanted = pairs[~met], wanted[~met]
        if wanted.any():
            self._add(pairs, wanted)

    def _add(self, pairs: Tensor, wanted: Tensor) -> None:
        """Put wanted constraints in the places of those that carry nothing, or in new ones."""
        unused = (self.weight <= 0).sum(1)
        short = int((wanted.sum(1) - unused).clamp_min(0).max())
        if short:
            pad = torch.nn.functional.pad
            self.normal, self.rows = pad(self.normal, (0, 0, 0, short)), pad(self.rows, (0, 0, 0, short), value=-1)
            self.offset, self.weight = pad(self.offset, (0, short)), pad(self.weight, (0, short))
        order = self.weight.argsort(dim=1, stable=True)
        lines = torch.arange(len(pairs), device=pairs.device)
        for turn in range(pairs.shape[1]):
            take = lines[wanted[:, turn]]
            place = order[take, (wanted[:, :turn].sum(1))[take]]
            near, far = pairs[take, turn].unbind(1)
            normal = self.planes.slope[near] - self.planes.slope[far]
            size = normal.norm(dim=1).clamp_min(1e-12)
            self.normal[take, place] = normal / size[:, None]
            self.offset[take, place] = (self.planes.level[far] - self.planes.level[near] + self.slack) / size
            self.rows[take, place] = pairs[take, turn]

    def _keep(self, which: Tensor) -> None:
        self.region, self.active = self.region.take(which), self.active[which]
        for name in ("normal", "offset", "weight", "rows", "inside", "outside"):
            setattr(self, name, getattr(self, name)[which])
