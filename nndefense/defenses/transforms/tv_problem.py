"""The convex problem of total variation minimisation: objective, certifying lower bound, and the steps to it.

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

from nndefense.errors import InputError, check_choice

KINDS = ("isotropic", "anisotropic", "lines")
DATA_TERMS = ("squared", "norm")
_FILL = 5
_REPAIR_STEPS = 12
#: Over-relaxation (Condat 2013): any value below 2 converges, and values close to it go fastest.
_RELAXATION = 1.9
#: Length of the primal steps from an iteration on: large ones first, which carry values across holes.
_STEPS = ((0, 0.2), (60, 0.1))
#: A bound is worth repairing when it lies at most so many tolerances off.
_REPAIR_WITHIN = 30.0
#: With the norm as data term, steps suit distances of this length between the image and its minimiser.
_DISTANCE = 6.0
_BUFFERS = 9


def check_terms(kind: str, data: str, weight: float) -> None:
    """Raise :class:`InputError` unless these name a problem that has a solution."""
    check_choice("kind", kind, KINDS)
    check_choice("data", data, DATA_TERMS)
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
    """TV(z) of the ``kind`` isotropic or anisotropic, of contiguous images N x C x H x W: float64, N; ``scratch`` is
    memory to work in."""
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
        """The problems of the images at ``rows`` only."""
        keep = None if self.keep is None else self.keep[rows]
        return TvProblem(self.images[rows], keep, self.weight, self.kind, self.data)

    def distance(self, z: Tensor, scratch: Tensor | None = None) -> Tensor:
        """``|m (z - x)|_2``, float64, N; ``scratch`` is memory to work in, like ``z``."""
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
        """What no image can go below, proved by the dual variables ``px``, ``py`` in the unit ball: float64, N.

        ``box`` is what :meth:`bounds` gives, ``scratch`` memory to work in; the squared data term without a mask needs
        none.
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
        """Dual variables near ``px``, ``py`` that leave less force on dropped pixels, and so prove a higher bound.

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


class Iterates:
    """The iterates of the images that are not finished, and buffers for their steps.

    The steps run on flat views: the neighbour along x is the next entry, that along y the W-th next. Dual variables
    that reach over a border are held at 0, so what stands behind it does not matter.

    Args:
        problem: of the images to begin with.
    """

    def __init__(self, problem: TvProblem) -> None:
        self._memory = problem.images.new_empty(_BUFFERS, *problem.images.shape)
        self._open(problem)

    def begin(self, images: Tensor | None, dual: tuple[Tensor, Tensor] | None) -> None:
        """Start from these images and dual variables; from the holes' neighbours and 0 where there are none."""
        self.done = 0
        self.bound = torch.full((len(self.z),), -torch.inf, dtype=torch.float64, device=self.z.device)
        if images is None:
            self.problem.fill(self.z)
        else:
            self.z.copy_(images)
        if dual is None:
            self.px.zero_()
            self.py.zero_()
        else:
            self.px.copy_(dual[0])
            self.py.copy_(dual[1])

    def _open(self, problem: TvProblem) -> None:
        """Views of the memory for the images of a problem."""
        self.problem = problem
        bare = problem.keep is None and problem.data == "squared"
        self.box = None if bare else problem.bounds()
        count, width = len(problem.images), problem.images.shape[-1]
        buffers = self._memory[:, :count]
        # The point that gaps are measured at, *_step, is the last one before relaxation.
        self.z, self.px, self.py, self.z_step, self.x_step, self.y_step, self.force, self.pulled, self.spare = buffers
        self._px_in, self._py_in = self.px.view(-1)[:-1], self.py.view(-1)[:-width]
        force = self.force.view(-1)
        self._force_x, self._force_x0 = force[1:], force[:-1]
        self._force_y, self._force_y0 = force[width:], force[:-width]
        self._diff_x, self._diff_y = self.x_step.view(-1)[:-1], self.y_step.view(-1)[:-width]
        self._last_x, self._last_y = self.x_step[..., -1], self.y_step[..., -1, :]
        self._step = 0.0

    def drop(self, finished: Tensor) -> None:
        """Go on without the finished images."""
        rest = (~finished).nonzero()[:, 0]
        kept = [buffer[rest] for buffer in (self.z, self.px, self.py, self.z_step, self.x_step, self.y_step)]
        self.bound = self.bound[rest]
        self._open(self.problem.select(rest))
        for buffer, part in zip((self.z, self.px, self.py, self.z_step, self.x_step, self.y_step), kept, strict=True):
            buffer.copy_(part)

    def best(self) -> Tensor:
        """The images as they are now, in their box."""
        low, high = self.box or self.problem.bounds()
        return torch.clamp(self.z_step, low, high)

    def certify(self, tolerance: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        """Objective and proved gap, float64, N each; :meth:`best` lies no higher.

        A gap of ``tolerance`` (N) of the objective plus ``floor`` is enough, and is not made smaller.
        """
        scratch = self.force, self.spare
        objective = self.problem.objective(self.z_step, scratch)
        self.bound = torch.maximum(self.bound, self.problem.lower_bound(self.x_step, self.y_step, self.box, scratch))
        gap = objective - self.bound
        if self.problem.keep is not None:
            limit = tolerance * objective + floor
            if bool(((gap > limit) & (gap < _REPAIR_WITHIN * limit)).any()):
                repaired = self.problem.repaired(self.x_step, self.y_step)
                self.bound = torch.maximum(self.bound, self.problem.lower_bound(*repaired, self.box, scratch))
                gap = objective - self.bound
        return objective, gap.clamp_min(0)

    def advance(self, until: int) -> None:
        """Iterate until this many iterations are done."""
        while self.done < until:
            self._prepare(next(step for begin, step in reversed(_STEPS) if begin <= self.done))
            self._iterate()
            self.done += 1

    def _prepare(self, step: float) -> None:
        """What depends on the step's length: kept entries move to ``pulled + held * (their step)``."""
        if step == self._step:
            return
        self._step = step
        keep = self.problem.keep
        torch.mul(self.problem.images, step / (1 + step), out=self.pulled)
        self.held: float | Tensor = 1 / (1 + step)
        if keep is not None:
            self.pulled.mul_(keep)
            self.held = 1 / (1 + step * keep)

    def _iterate(self) -> None:
        step = self._step
        if self.problem.data == "norm":
            step *= _DISTANCE
        rate = 1 / (8 * step * self.problem.weight)
        # Primal: against the force of the dual variables, and towards the kept pixels.
        torch.add(self.px, self.py, out=self.force)
        self._force_x.sub_(self._px_in)
        self._force_y.sub_(self._py_in)
        if self.problem.data == "norm":
            self._shrink(step)
        elif isinstance(self.held, float):
            torch.add(self.pulled, self.z, alpha=self.held, out=self.z_step)
            self.z_step.add_(self.force, alpha=self.held * step * self.problem.weight)
        else:
            torch.add(self.z, self.force, alpha=step * self.problem.weight, out=self.z_step)
            torch.addcmul(self.pulled, self.held, self.z_step, out=self.z_step)
        # Dual: along the differences of the extrapolated image.
        torch.lerp(self.z, self.z_step, 2.0, out=self.force)
        self.z.lerp_(self.z_step, _RELAXATION)
        torch.sub(self._force_x, self._force_x0, out=self._diff_x)
        torch.sub(self._force_y, self._force_y0, out=self._diff_y)
        torch.add(self.px, self.x_step, alpha=rate, out=self.x_step)
        torch.add(self.py, self.y_step, alpha=rate, out=self.y_step)
        self._last_x.zero_()
        self._last_y.zero_()
        project(self.x_step, self.y_step, self.problem.kind, self.spare)
        self.px.lerp_(self.x_step, _RELAXATION)
        self.py.lerp_(self.y_step, _RELAXATION)

    def _shrink(self, step: float) -> None:
        """The primal step of the norm: kept pixels as a whole draw nearer to the image, by at most the step."""
        torch.add(self.z, self.force, alpha=step * self.problem.weight, out=self.z_step)
        off = torch.sub(self.z_step, self.problem.images, out=self.spare)
        if self.problem.keep is not None:
            off.mul_(self.problem.keep)
        length = torch.linalg.vector_norm(off, dim=(1, 2, 3), keepdim=True)
        share = (step / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max_(1)
        self.z_step.sub_(off.mul_(share))
