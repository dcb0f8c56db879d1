"""The steps of the primal-dual method on many images, in place and over contiguous memory."""

from __future__ import annotations

import torch
from torch import Tensor

from nndefense.defenses.transforms.tv_problem import TvProblem, project

#: Over-relaxation (Condat 2013): any value below 2 converges, and values close to it go fastest.
_RELAXATION = 1.9
#: Length of the primal steps from an iteration on: large ones first, which carry values across holes.
_STEPS = ((0, 0.2), (60, 0.1))
#: A bound is worth repairing when it lies at most so many tolerances off.
_REPAIR_WITHIN = 30.0
#: With the norm as data term, steps suit distances of this length between the image and its minimiser.
_DISTANCE = 6.0
_BUFFERS = 9


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
