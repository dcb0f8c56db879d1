"""The convex problem of total variation minimisation: its objective, and a lower bound that certifies a solution.

For one image x (C x H x W) with a keep mask m of zeros and ones, over images z::

    squared:  1/2 |m (z - x)|_2^2 + weight TV(z)
    norm:         |m (z - x)|_2   + weight TV(z)

``TV(z) = sum over channels and pixels of |(d_x z, d_y z)|`` with forward differences that are 0 at the far borders, and
the length of that pair measured by ``kind``: l_2 (``isotropic``), l_1 (``anisotropic``), or, as ``lines``, the sum of
the l_2 lengths of whole row and column differences.

Where the sources disagree. Guo et al. (ICLR 2018, section 4) write the norm without a square. Both known codes, the
authors' (AID) and that of Athalye et al. (2018), run split Bregman, whose data term is squared; so ``squared`` is
the default here and ``norm`` the option. For one image the two are one family: the minimiser of ``norm`` is that of
``squared`` with the weight multiplied by its own ``|m (z - x)|_2``. The paper's formula for TV_2 reads as ``lines``;
AID runs ``isotropic``, the default, and Athalye et al. ``anisotropic``. Split Bregman's weight W means
``weight = 1 / W``: .03 in AID, the default, and .015 with Athalye et al. Both stop long before the minimum, so their
images are not quite the minimisers found here.

A minimiser stays between the least and the greatest kept value of its channel, because clipping raises neither term. So
the dual may be taken over that box, and every dual point, even one that leaves a force on dropped pixels, proves a
finite lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nndefense.errors import InputError

KINDS = ("isotropic", "anisotropic", "lines")
DATA_TERMS = ("squared", "norm")
_FILL = 5
_REPAIR_STEPS = 12


def check_terms(kind: str, data: str, weight: float) -> None:
    """Raise :class:`InputError` unless these name a problem that has a solution."""
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}, but must be one of {', '.join(KINDS)}")
    if data not in DATA_TERMS:
        raise InputError(f"data is {data!r}, but must be one of {', '.join(DATA_TERMS)}")
    if not 0 < weight < float("inf"):
        raise InputError(f"weight is {weight}, but must be positive and finite")


def differences(z: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Forward differences of contiguous N x C x H x W along x and y, 0 in the last column and the last row."""
    dx, dy = out or (torch.empty_like(z), torch.empty_like(z))
    flat, width = z.view(-1), z.shape[-1]
    # Over flat memory, which is faster than over slices; what reaches over a border is put to 0 afterwards.
    torch.sub(flat[1:], flat[:-1], out=dx.view(-1)[:-1])
    torch.sub(flat[width:], flat[:-width], out=dy.view(-1)[:-width])
    dx[..., -1] = 0
    dy[..., -1, :] = 0
    return dx, dy


def divergence(px: Tensor, py: Tensor, out: Tensor | None = None) -> Tensor:
    """Minus the adjoint of :func:`differences`, for ``px`` 0 in the last column and ``py`` 0 in the last row."""
    out, width = torch.add(px, py, out=out), px.shape[-1]
    flat = out.view(-1)
    flat[1:].sub_(px.view(-1)[:-1])
    flat[width:].sub_(py.view(-1)[:-width])
    return out


def project(px: Tensor, py: Tensor, kind: str, scratch: Tensor | None = None) -> None:
    """Bring dual variables N x C x H x W to the unit ball of the norm dual to ``kind``'s, in place.

    ``scratch``, of the same shape, spares an allocation.
    """
    if kind == "anisotropic":
        px.clamp_(-1, 1)
        py.clamp_(-1, 1)
    elif kind == "isotropic":
        lengths = torch.mul(px, px, out=scratch) if scratch is not None else px * px
        shrink = lengths.addcmul_(py, py).clamp_min_(1).rsqrt_()
        px.mul_(shrink)
        py.mul_(shrink)
    else:
        px.div_(px.norm(dim=-2, keepdim=True).clamp_min_(1))
        py.div_(py.norm(dim=-1, keepdim=True).clamp_min_(1))


def total_variation(z: Tensor, kind: str = "isotropic", scratch: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """TV(z) of contiguous images N x C x H x W: float64, N."""
    dx, dy = differences(z, scratch)
    if kind == "anisotropic":
        return _sum(dx.abs_().add_(dy.abs_()))
    if kind == "isotropic":
        return _sum(dx.mul_(dx).addcmul_(dy, dy).sqrt_())
    return _sum(dx.norm(dim=-2)) + _sum(dy.norm(dim=-1))


def _sum(entries: Tensor) -> Tensor:
    """Sum over all but the first axis: rows in the tensor's own type, which is fast, then rows in float64."""
    return entries.sum(-1).flatten(1).sum(1, dtype=torch.float64)


@dataclass(frozen=True)
class TvProblem:
    """One problem per image of a batch.

    Attributes:
        images: x, N x C x H x W.
        keep: m of the same shape and type, zeros and ones; None keeps everything.
        weight: of the total variation, positive.
        kind: one of :data:`KINDS`.
        data: one of :data:`DATA_TERMS`.
    """

    images: Tensor
    keep: Tensor | None
    weight: float
    kind: str
    data: str

    def select(self, rows: Tensor | slice) -> TvProblem:
        """The problems of some images only."""
        keep = None if self.keep is None else self.keep[rows]
        return TvProblem(self.images[rows], keep, self.weight, self.kind, self.data)

    def distance(self, z: Tensor, scratch: Tensor | None = None) -> Tensor:
        """``|m (z - x)|_2``, float64, N."""
        off = torch.sub(z, self.images, out=scratch)
        if self.keep is not None:
            off.mul_(self.keep)
        return _sum(off.mul_(off)).sqrt_()

    def objective(self, z: Tensor, scratch: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The objective at contiguous images z: float64, N. ``scratch``, two of their shape, spares allocations."""
        distance = self.distance(z, None if scratch is None else scratch[0])
        fit = distance if self.data == "norm" else distance.square().mul_(0.5)
        return fit + self.weight * total_variation(z, self.kind, scratch)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Least and greatest kept value of each channel, N x C x 1 x 1; 0 and 1 where nothing is kept."""
        if self.keep is None:
            return self.images.amin((2, 3), keepdim=True), self.images.amax((2, 3), keepdim=True)
        kept = self.keep > 0
        low = self.images.masked_fill(~kept, torch.inf).amin((2, 3), keepdim=True)
        high = self.images.masked_fill(~kept, -torch.inf).amax((2, 3), keepdim=True)
        return torch.where(low.isinf(), 0.0, low), torch.where(high.isinf(), 1.0, high)

    def fill(self, out: Tensor) -> None:
        """Write the images to ``out``, dropped pixels at the mean of kept ones near by: a first guess."""
        if self.keep is None:
            out.copy_(self.images)
            return
        kept = self.images * self.keep
        near, share = (F.avg_pool2d(t, _FILL, stride=1, padding=_FILL // 2) for t in (kept, self.keep))
        all_kept = kept.sum((2, 3), keepdim=True) / self.keep.sum((2, 3), keepdim=True).clamp_min(1)
        holes = torch.where(share > 0, near / share.clamp_min(1e-6), all_kept)
        torch.where(self.keep > 0, self.images, holes, out=out)

    def lower_bound(
        self, px: Tensor, py: Tensor, box: tuple[Tensor, Tensor] | None, scratch: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """What no image can go below, proved by dual variables in the unit ball: float64, N.

        ``box`` is what :meth:`bounds` gives; the squared data term without a mask needs none.
        """
        first, second = (None, None) if scratch is None else scratch
        force = divergence(px, py, first).mul_(-self.weight)
        if self.keep is None and self.data == "squared":
            return _sum(torch.sub(self.images, force, alpha=0.5, out=second).mul_(force))
        assert box is not None
        # What pixels give way to the force on them where nothing but the box holds them.
        loose = torch.minimum(force * box[0], force * box[1])
        pull = force if self.keep is None else force * self.keep
        if self.data == "norm":
            # The data term holds no more than a force of length 1.
            share = (1 / _sum(pull.square()).sqrt().clamp_min(1)).to(force)[:, None, None, None]
            held = share * pull * self.images + (1 - share) * loose
        else:
            held = torch.sub(self.images, pull, alpha=0.5).mul_(pull)
        return _sum(held if self.keep is None else torch.where(self.keep > 0, held, loose))

    def repaired(self, px: Tensor, py: Tensor) -> tuple[Tensor, Tensor]:
        """Dual variables near these that leave less force on dropped pixels, and so prove a higher bound.

        Accelerated projected gradient steps on half the squared force, within the unit ball.
        """
        if self.keep is None:
            return px, py
        dropped = 1 - self.keep
        at_x, at_y, last_x, last_y, scratch = px.clone(), py.clone(), px.clone(), py.clone(), torch.empty_like(px)
        step_x, step_y = torch.empty_like(px), torch.empty_like(py)
        for step in range(_REPAIR_STEPS):
            differences(divergence(at_x, at_y, scratch).mul_(dropped), (step_x, step_y))
            # 8 bounds the squared norm of the differences.
            step_x.div_(8).add_(at_x)
            step_y.div_(8).add_(at_y)
            project(step_x, step_y, self.kind, scratch)
            momentum = step / (step + 3)
            torch.lerp(last_x, step_x, 1 + momentum, out=at_x)
            torch.lerp(last_y, step_y, 1 + momentum, out=at_y)
            last_x, step_x, last_y, step_y = step_x, last_x, step_y, last_y
        return last_x, last_y
