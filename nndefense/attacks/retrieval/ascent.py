"""Projected ascent on an objective that is made anew every few steps, watched by the true pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nndefense.attacks import norms
from nndefense.attacks.checks import at_least, check_labels
from nndefense.attacks.retrieval.surface import Knowledge, RetrievalSurface
from nndefense.errors import InputError
from nndefense.images import check_images

BATCH = 100
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
    check_labels(y, x)
    at_least("steps", steps)
    return Problem(surface.counted(), x.detach(), y.to(x.device), norms.radius(x, eps, norm), norm)


class Objective:
    """What an ascent raises: made from a surface, and from ``target`` (N classes) where it can be aimed.

    State is kept for the images that are still under attack, in their order.
    """

    #: The tensors (or what is indexed like one) of which each image has its own.
    state: ClassVar[tuple[str, ...]] = ()
    #: Steps between two looks around; 0: never again.
    refresh: int = 0
    #: Whether it looks at features; else it is given some that are N x 0.
    looks_at_features: bool = True

    def renew(self, problem: Problem, features: Tensor) -> None:
        """Look around again, before the first step and every ``refresh`` steps: features N x d without a gradient."""
        raise NotImplementedError

    def value(self, images: Tensor, features: Tensor, progress: float) -> tuple[Tensor, Tensor | None]:
        """What is raised, N, and whether the attacker's own copy of the defence is fooled, N, where he has one.

        Args:
            images: N x C x H x W under attack.
            features: N x d of them.
            progress: the share of steps done.
        """
        raise NotImplementedError

    def keep(self, index: Tensor) -> None:
        """Go on with some of the images only."""
        for name in self.state:
            held = getattr(self, name)
            setattr(self, name, None if held is None else held[index])


def ascend(
    problem: Problem,
    objective: Objective,
    start: Tensor,
    *,
    steps: int,
    stride: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Raise the objective by sign (l_inf) or unit-gradient (l_2) steps with momentum, inside ball and box.

    A step costs one forward pass and one gradient. Steps shrink from ``stride`` radii to nearly 0 along a cosine.
    Where the attacker's own copy of the defence says that an iterate has succeeded, the true pipeline
    is asked; images that fool it are finished. The last iterate is shown to it in any case.

    Args:
        problem: see :func:`pose`.
        objective: what is raised.
        start: N x C x H x W, inside the ball.
        steps: at least 1.
        stride: first step in radii.

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
    look = (
        surface.need_features("this attack") if objective.looks_at_features else lambda images: images.flatten(1)[:, :0]
    )
    for step in range(steps):
        if not len(active):
            break
        progress = step / steps
        renewed = step == 0 or (objective.refresh > 0 and step % objective.refresh == 0)
        images = current.detach().requires_grad_(True)
        with torch.enable_grad():
            features = look(images)
            if renewed:
                objective.renew(part, features.detach())
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
        length = part.radii * stride * 0.5 * (1 + math.cos(math.pi * progress))
        moved = current + norms.per_image(length, current) * norms.steepest(velocity, problem.norm)
        current = part.bring_in(moved)
    if len(active):
        out[active] = current
        done[active] = surface.fooled(current, part.y)
    return out, done


def attack(
    surface: RetrievalSurface,
    x: Tensor,
    y: Tensor,
    objective: Callable[..., Objective],
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 100,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    random_start: bool = False,
    restarts: int = 1,
    target: Tensor | None = None,
    stride: float = 1.0,
    batch_size: int = BATCH,
    **settings: Any,
) -> Tensor:
    """Raise an objective inside a budget: what all attacks on retrieval that have one share.

    Args:
        surface: what the attacker holds; each objective says what it needs of it.
        x: clean images, N x C x H x W in [0, 1].
        y: class numbers N.
        objective: makes what is raised, from the surface and ``settings``.
        eps: radius, one number or one per image; in units of ``norm``.
        norm: ``linf``, ``l2`` or ``normalized-l2``.
        steps: gradient steps of each start, at least 1.
        generator: source of random starts.
        start: where to begin, N x C x H x W, brought into the ball; default x.
        random_start: begin at a uniform draw from the ball instead.
        restarts: starts, at least 1; all but the first are random draws, for images that the true pipeline still gets
            right.
        target: N classes to aim at, where the objective can be aimed.
        stride: first step in radii.
        batch_size: images attacked at a time, which bounds the memory.
        settings: of the objective.

    Returns:
        Images of the shape of x, inside the ball and in [0, 1]: the first iterate that the true pipeline was seen to
        misclassify, or else the last one of the first start.

    Raises:
        InputError: images, labels or settings that cannot be used, or a surface that lacks what the objective needs.
    """
    problem = pose(surface, x, y, eps, norm, steps=steps)
    at_least("restarts", restarts)
    if batch_size < 1:
        raise InputError(f"the batch size must be at least 1, not {batch_size}")

    def run(index: Tensor, begin: Tensor) -> tuple[Tensor, Tensor]:
        images, fell = begin.clone(), torch.zeros(len(begin), dtype=torch.bool, device=begin.device)
        for place in torch.split(torch.arange(len(begin), device=begin.device), batch_size):
            part = index[place]
            aim = {} if target is None else {"target": target[part]}
            raised = objective(problem.surface, **aim, **settings)
            images[place], fell[place] = ascend(problem.take(part), raised, begin[place], steps=steps, stride=stride)
        return images, fell

    begin = problem.random_start(generator) if random_start else problem.x
    begin = begin if start is None else problem.bring_in(start.to(problem.x))
    everything = torch.arange(len(x), device=x.device)
    images, fell = run(everything, begin)
    for _ in range(restarts - 1):
        standing = everything[~fell]
        if not len(standing):
            break
        again, now = run(standing, problem.take(standing).random_start(generator))
        images[standing[now]], fell[standing[now]] = again[now], True
    return images


def _unit(gradient: Tensor) -> Tensor:
    """Each image's gradient with mean size 1, so that momentum weighs directions and not the loss's scale."""
    mean = gradient.flatten(1).abs().mean(1).clamp_min(torch.finfo(gradient.dtype).tiny)
    return gradient / norms.per_image(mean, gradient)
