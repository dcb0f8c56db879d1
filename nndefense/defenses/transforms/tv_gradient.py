"""How the minimiser of total variation moves with the image: the implicit gradient of the converged problem.

At the minimiser z of ``D(z, x) + weight TV(z)`` the gradient in z is 0, so that ``H dz = B dx`` with the Hessians
``H = B + weight K`` in z and ``-B`` in z and x. Its adjoint turns a gradient at z into one at x:
``x_bar = B H^-1 z_bar``, one symmetric linear system, solved by conjugate gradients.

K is the Hessian of the lengths ``sqrt(|g|^2 + smoothing^2)`` of the differences g, ``(I - g g^T / l^2) / l``. Without
its second part it is the matrix of lagged diffusivity (Vogel and Oman 1996), which the same system can be solved
with; but the Hessian is the derivative itself: as the smoothing goes to 0 it meets finite differences of the true
minimiser, which the other does not. Where the image is flat, a small smoothing ties its pixels firmly together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nndefense.defenses.transforms.tv_problem import TvProblem, differences, divergence

SMOOTHING = 0.01
ITERATIONS = 25
#: Ties what neither kept pixels nor differences hold.
_RIDGE = 1e-6

Operator = Callable[[Tensor], Tensor]


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each image's entries: N x C x H x W -> N x 1 x 1 x 1."""
    return (a * b).sum((1, 2, 3), keepdim=True)


def _curvature(problem: TvProblem, z: Tensor, smoothing: float) -> tuple[Operator, Tensor]:
    """K as a function of images, and its diagonal without what neighbours share."""
    dx, dy = differences(z)
    if problem.kind == "isotropic":
        squares = dx.square() + dy.square()
        lengths_x = lengths_y = (squares + smoothing**2).sqrt()
    elif problem.kind == "anisotropic":
        lengths_x, lengths_y = ((d.square() + smoothing**2).sqrt() for d in (dx, dy))
    else:
        lengths_x = (dx.square().sum(-2, keepdim=True) + smoothing**2).sqrt()
        lengths_y = (dy.square().sum(-1, keepdim=True) + smoothing**2).sqrt()
    unit_x, unit_y = dx / lengths_x, dy / lengths_y

    def apply(images: Tensor) -> Tensor:
        ux, uy = differences(images)
        along_x, along_y = ux * unit_x, uy * unit_y
        if problem.kind == "isotropic":
            along_x = along_y = along_x + along_y
        elif problem.kind == "lines":
            along_x, along_y = along_x.sum(-2, keepdim=True), along_y.sum(-1, keepdim=True)
        px = torch.addcmul(ux, along_x, unit_x, value=-1).div_(lengths_x)
        py = torch.addcmul(uy, along_y, unit_y, value=-1).div_(lengths_y)
        return divergence(px, py).neg_()

    weight_x, weight_y = (1 - unit_x.square()) / lengths_x, (1 - unit_y.square()) / lengths_y
    weight_x[..., -1], weight_y[..., -1, :] = 0, 0
    diagonal = weight_x + weight_y
    diagonal[..., 1:] += weight_x[..., :-1]
    diagonal[..., 1:, :] += weight_y[..., :-1, :]
    return apply, diagonal


def _data_curvature(problem: TvProblem, z: Tensor, smoothing: float) -> tuple[Operator, Tensor]:
    """B as a function of images, and its diagonal."""
    keep = torch.ones_like(z) if problem.keep is None else problem.keep
    if problem.data == "squared":
        return (lambda images: keep * images), keep
    off = keep * (z - problem.images)
    length = (_inner(off, off) + smoothing**2).sqrt()
    unit = off / length
    return (lambda images: (keep * images - unit * _inner(unit, images)) / length), keep * (1 - unit.square()) / length


@torch.no_grad()
def adjoint(
    problem: TvProblem, z: Tensor, gradient: Tensor, *, smoothing: float = SMOOTHING, iterations: int = ITERATIONS
) -> Tensor:
    """The gradient at the images that a gradient at their minimisers comes from: N x C x H x W.

    Args:
        problem: whose minimisers these are.
        z: the minimisers, contiguous, N x C x H x W.
        gradient: at them, N x C x H x W.
        smoothing: of the lengths of differences, in pixel values, above 0; small ones need more iterations.
        iterations: of conjugate gradients with the diagonal as preconditioner.
    """
    curve, diagonal = _curvature(problem, z, smoothing)
    pull, held = _data_curvature(problem, z, smoothing)
    scale = (held + problem.weight * diagonal + _RIDGE).reciprocal()
    found, rest = torch.zeros_like(gradient), gradient.clone()
    ahead = scale * rest
    step, size = ahead.clone(), _inner(rest, ahead)
    tiny = torch.finfo(size.dtype).tiny
    for _ in range(iterations):
        met = pull(step) + problem.weight * curve(step) + _RIDGE * step
        length = size / _inner(step, met).clamp_min(tiny)
        found += length * step
        rest -= length * met
        ahead = scale * rest
        before, size = size, _inner(rest, ahead)
        step = ahead + (size / before.clamp_min(tiny)) * step
    return pull(found)


class Minimised(torch.autograd.Function):
    """Images -> the minimisers that were found for them, with the implicit gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, minimisers: Tensor, problem: TvProblem) -> Tensor:
        ctx.problem = problem
        ctx.save_for_backward(minimisers)
        return minimisers.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (minimisers,) = ctx.saved_tensors
        return adjoint(ctx.problem, minimisers, gradient.contiguous()), None, None
