"""Projected ascent on an objective that is made anew every few steps, watched by the true pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from nndefense.attacks import norms
from nndefense.attacks.retrieval.surface import Knowledge, RetrievalSurface
from nndefense.errors import InputError
from nndefense.images import check_images

Schedule = Literal["cosine", "constant"]
_MOMENTUM = 0.75


@dataclass(frozen=True)
class Problem:
    """What every attack of the package is given, checked: see :func:`pose`.

    Attributes:
        surface: the counted surface.
        x, y: clean images N x C x H x W and their classes N.
        radii: N radii in raw pixels.
        norm: one of :data:`nndefense.attacks.NORMS`.
    """

    surface: RetrievalSurface
    x: Tensor
    y: Tensor
    radii: Tensor
    norm: str

    def take(self, index: Tensor) -> Problem:
        """The problem of some of the images."""
        return Problem(self.surface, self.x[index], self.y[index], self.radii[index], self.norm)

    def bring_in(self, images: Tensor) -> Tensor:
        """Project images into the ball around x, then on [0, 1]."""
        return (self.x + norms.project(images - self.x, self.radii, self.norm)).clamp(0, 1)

    def random_start(self, generator: torch.Generator | None, share: float = 1.0) -> Tensor:
        """A uniform draw from the ball of ``share`` times the radius."""
        return (self.x + norms.random_in_ball(self.x, self.radii * share, self.norm, generator)).clamp(0, 1)


def pose(surface: RetrievalSurface, x: Tensor, y: Tensor, eps: float | Tensor, norm: str, *, steps: int = 1) -> Problem:
    """Check what an attack is given.

    Raises:
        InputError: images, class numbers, eps, norm or a number of steps that cannot be used.
    """
    check_images(x)
    if y.shape != x.shape[:1] or y.is_floating_point():
        raise InputError(f"labels have shape {tuple(y.shape)}, but must be one class number per image ({len(x)})")
    if steps < 1:
        raise InputError(f"steps is {steps}, but must be at least 1")
    return Problem(surface.counted(), x.detach(), y.to(x.device), norms.radius(x, eps, norm), norm)


class Objective(Protocol):
    """What an ascent raises. State is kept for the images that are still under attack, in their order."""

    refresh: int

    def renew(self, problem: Problem, images: Tensor, features: Tensor | None, progress: float) -> None:
        """Look around again: the images under attack, their features without a gradient, and the share of steps done.

        Called before the first step, and then every ``refresh`` steps (0: never again).
        """

    def keep(self, index: Tensor) -> None:
        """Go on with some of the images only."""

    def value(self, images: Tensor, features: Tensor | None, progress: float) -> tuple[Tensor, Tensor | None]:
        """What is raised, N, and whether the attacker's own copy of the defence is fooled, N, where he has one."""


def ascend(
    problem: Problem,
    objective: Objective,
    start: Tensor,
    *,
    steps: int,
    stride: float = 1.0,
    schedule: Schedule = "cosine",
    use_features: bool = True,
) -> tuple[Tensor, Tensor]:
    """Raise the objective by sign (l_inf) or unit-gradient (l_2) steps with momentum, inside ball and box.

    A step costs one forward pass and one gradient. Steps shrink from ``stride`` radii to nearly 0 along a cosine, or
    stay constant. Where the attacker's own copy of the defence says that an iterate has succeeded, the true pipeline
    is asked; images that fool it are finished. The last iterate is shown to it in any case.

    Args:
        problem: see :func:`pose`.
        objective: what is raised.
        start: N x C x H x W, inside the ball.
        steps: at least 1.
        stride: first step in radii.
        schedule: ``cosine`` or ``constant``.
        use_features: whether the objective looks at features (it gets None otherwise).

    Returns:
        Images N x C x H x W, the first that fooled the true pipeline or else the last iterate, and whether they
        fool it, N.
    """
    surface, out = problem.surface, start.detach().clone()
    done = torch.zeros(len(out), dtype=torch.bool, device=out.device)
    active = torch.arange(len(out), device=out.device)
    current, part = out.clone(), problem
    velocity = torch.zeros_like(current)
    # A copy with every row is right but for rounding: ask at once. With less, ask only where it costs little.
    eager = surface.knowledge is Knowledge.WHITE
    for step in range(steps):
        if not len(active):
            break
        progress = step / steps
        renewed = step == 0 or (objective.refresh > 0 and step % objective.refresh == 0)
        images = current.detach().requires_grad_(True)
        with torch.enable_grad():
            features = surface.need_features("this attack")(images) if use_features else None
            if renewed:
                objective.renew(part, images.detach(), None if features is None else features.detach(), progress)
            value, proxy = objective.value(images, features, progress)
            (gradient,) = torch.autograd.grad(value.sum(), images)
        surface.counts.backwards += len(images)
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        fooled = torch.zeros(len(active), dtype=torch.bool, device=out.device)
        if proxy is not None and (eager or renewed) and bool(proxy.any()):
            fooled[proxy] = surface.fooled(current[proxy], part.y[proxy])
        if bool(fooled.any()):
            out[active[fooled]], done[active[fooled]] = current[fooled], True
            left = ~fooled
            active, current, velocity, gradient = active[left], current[left], velocity[left], gradient[left]
            part = part.take(left)
            objective.keep(left)
        velocity = _MOMENTUM * velocity + _unit(gradient)
        length = part.radii * stride * (0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0)
        moved = current + norms.per_image(length, current) * norms.steepest(velocity, problem.norm)
        current = part.bring_in(moved)
    if len(active):
        out[active] = current
        done[active] = surface.fooled(current, part.y)
    return out, done


def in_batches(
    attack: Callable[[Problem, Tensor, Tensor | None], Tensor],
    problem: Problem,
    start: Tensor,
    target: Tensor | None,
    batch_size: int,
) -> Tensor:
    """Run ``attack(problem, start, target)`` on at most ``batch_size`` images at a time, to bound its memory."""
    if batch_size < 1:
        raise InputError(f"the batch size must be at least 1, not {batch_size}")
    parts = torch.split(torch.arange(len(problem.x), device=problem.x.device), batch_size)
    if len(parts) <= 1:
        return attack(problem, start, target)
    return torch.cat([attack(problem.take(i), start[i], None if target is None else target[i]) for i in parts])


def _unit(gradient: Tensor) -> Tensor:
    """Each image's gradient with mean size 1, so that momentum weighs directions and not the loss's scale."""
    mean = gradient.flatten(1).abs().mean(1).clamp_min(torch.finfo(gradient.dtype).tiny)
    return gradient / norms.per_image(mean, gradient)
