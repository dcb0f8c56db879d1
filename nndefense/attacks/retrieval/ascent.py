"""Projected ascent on an objective that is made anew every few steps, watched by the true pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nndefense.attacks import norms
from nndefense.attacks.checks import at_least, check_labels
from nndefense.attacks.door import wide_types
from nndefense.attacks.losses import gradient_to
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
        """The nearest images in ball and box."""
        return norms.projector(self.x, self.radii, self.norm, exact=True)(images)

    def random_start(self, generator: torch.Generator | None, share: float = 1.0) -> Tensor:
        """A uniform draw from the ball of ``share`` times the radius."""
        return (self.x + norms.random_in_ball(self.x, self.radii * share, self.norm, generator)).clamp(0, 1)

    @torch.no_grad()
    def clean_features(self) -> Tensor:
        """The features of the clean images, N x d."""
        return self.surface.need_features("the attack")(self.x)


def pose(surface: RetrievalSurface, x: Tensor, y: Tensor, eps: float | Tensor, norm: str, *, steps: int = 1) -> Problem:
    """Check what an attack is given.

    Raises:
        InputError: images, class numbers, eps, norm or a number of steps that cannot be used.
    """
    check_images(x)
    check_labels(y, x)
    at_least("steps", steps)
    return Problem(surface.counted(), x.detach(), y.to(x.device), norms.radius(x, eps, norm), norm)


class Raised(NamedTuple):
    """What an objective says of N images.

    Attributes:
        value: N, what is raised, with a gradient.
        score: N, how near the attacker's own copy of the defence is to the attack's aim, above 0 beyond it; by it the
            best iterate is kept. None where there is no copy: then the last one is.
        fooled: N, whether that copy is fooled; None where there is none.
    """

    value: Tensor
    score: Tensor | None = None
    fooled: Tensor | None = None


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

    def value(self, images: Tensor, features: Tensor, progress: float) -> Raised:
        """What is raised, and what the attacker's own copy of the defence says.

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
) -> tuple[Tensor, Tensor, Tensor]:
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
        Images N x C x H x W, the first that fooled the true pipeline, else the iterate with the highest score (the last
        one, of an objective without scores); whether they fool it, N; and those scores, N, minus infinity without.
    """
    surface, out = problem.surface, start.detach().clone()
    done = torch.zeros(len(out), dtype=torch.bool, device=out.device)
    scores = torch.full_like(problem.radii, -torch.inf)
    active = torch.arange(len(out), device=out.device)
    current, part = out.clone(), problem
    velocity = torch.zeros_like(current)
    # A copy with every row is right but for rounding: ask at once. With less, ask only where it costs little.
    eager = surface.knowledge is Knowledge.WHITE
    look = (
        surface.need_features("this attack") if objective.looks_at_features else lambda images: images.flatten(1)[:, :0]
    )

    def keep(found: Raised) -> None:
        """Note the iterates that are as good as any before."""
        better = torch.ones_like(active, dtype=torch.bool) if found.score is None else found.score >= scores[active]
        out[active[better]] = current[better]
        if found.score is not None:
            scores[active[better]] = found.score[better]

    for step in range(steps):
        if not len(active):
            break
        renewed = step == 0 or (objective.refresh > 0 and step % objective.refresh == 0)
        images = current.detach().requires_grad_(True)
        with torch.enable_grad():
            features = look(images)
            if renewed:
                objective.renew(part, features.detach())
            found = objective.value(images, features, step / steps)
            gradient = gradient_to(images, found.value.sum())
        surface.counts.backwards += len(images)
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        keep(found)
        left = torch.ones_like(active, dtype=torch.bool)
        if found.fooled is not None and (eager or renewed) and bool(found.fooled.any()):
            left[found.fooled] = ~surface.fooled(current[found.fooled], part.y[found.fooled])
        if not bool(left.all()):
            out[active[~left]], done[active[~left]] = current[~left], True
            active, current, velocity, gradient = active[left], current[left], velocity[left], gradient[left]
            part = part.take(left)
            objective.keep(left)
        velocity = _MOMENTUM * velocity + _unit(gradient)
        length = part.radii * stride * 0.5 * (1 + math.cos(math.pi * step / steps))
        current = part.bring_in(current + norms.per_image(length, current) * norms.steepest(velocity, problem.norm))
    if len(active):
        with torch.no_grad():
            # Without a score there is nothing to compare the last one with.
            keep(objective.value(current, look(current), 1.0) if found.score is not None else found)
        done[active] = surface.fooled(out[active], part.y)
    return out, done, scores


@wide_types
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
        misclassify, or else the best one of the first start, as :func:`ascend` has it.

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
            images[place], fell[place], _ = ascend(problem.take(part), raised, begin[place], steps=steps, stride=stride)
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
