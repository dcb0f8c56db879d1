"""Running an attack by its name on a model or on a retrieval surface, and what it cost."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nndefense import attacks
from nndefense.attacks import registry
from nndefense.attacks.retrieval import RetrievalSurface
from nndefense.errors import InputError
from nndefense.evaluation.threats import AttackSettings

# How far an attack that is not the library's may pass its budget or the box, for rounding.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Attacked:
    """What an attack made of a batch, and its cost in images x passes.

    Attributes:
        images: N x C x H x W, each within its budget and in [0, 1].
        forwards, backwards: passes through what was attacked.
        queries: answers asked of the true defence.
    """

    images: Tensor
    forwards: int = 0
    backwards: int = 0
    queries: int = 0


def run_attack(
    settings: AttackSettings, target: Any, images: Tensor, labels: Tensor, eps: float, generator: torch.Generator
) -> Attacked:
    """Attack a batch at one radius.

    Args:
        settings: which attack, and how strongly; its own radii are not looked at.
        target: images N x C x H x W -> logits N x K, or a :class:`RetrievalSurface`.
        images: clean images, N x C x H x W in [0, 1].
        labels: class numbers N of the target.
        eps: the radius, in units of the settings' norm.
        generator: source of random starts.

    Raises:
        InputError: an attack that does not fit the target or the norm.
    """
    attack, surface = settings.attack, isinstance(target, RetrievalSurface)
    if attack.on_retrieval and not surface:
        raise InputError(f"the attack {attack.name!r} is one on retrieval, not on a classifier")
    if surface and "gradient" in attack.needs:
        raise InputError(f"the attack {attack.name!r} needs a gradient of the defence: choose one on retrieval")
    if attack.on_retrieval:
        target.counts.reset()
        seen, counts = target, target.counts
    else:
        seen = counts = attacks.Counted(target.predict if surface else target)
    made: Tensor = attack.run(
        seen,
        images,
        labels,
        effort=settings.effort,
        restarts=settings.restarts,
        loss=settings.loss,
        eps=eps,
        norm=settings.norm,
        generator=generator,
    )
    if attack.name not in registry.SHIPPED:
        made = _checked(made, images, eps, settings)
    if attack.least:
        size = attacks.distance(images, made, settings.norm)
        inside = size <= attacks.radius(images, eps, settings.norm)
        # The clean image where the least change found is larger than the budget.
        made = torch.where(inside[:, None, None, None], made, images)
    # Every pass through the true defence is a query.
    forwards = 0 if surface and not attack.on_retrieval else counts.forwards
    return Attacked(made, forwards, counts.backwards, counts.queries)


def _checked(made: Any, x: Tensor, eps: float, settings: AttackSettings) -> Tensor:
    """What an attack of the user's made, which must be images inside ball and box but for rounding."""
    name, least = settings.name, settings.attack.least
    if not len(x):
        return x
    if not isinstance(made, Tensor) or made.shape != x.shape or not made.is_floating_point():
        given = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
        raise InputError(f"the attack {name} returned {given}, but must return images like {tuple(x.shape)}")
    images: Tensor = made.detach().to(x)
    if wrong := int((~images.isfinite()).flatten(1).any(1).sum()):
        raise InputError(f"the attack {name} returned NaN or infinite pixels in {wrong} of {len(x)} images")
    beyond = (images - 0.5).abs().flatten(1).amax(1) - 0.5
    if (excess := float(beyond.max())) > _ROUNDING:
        raise InputError(f"the attack {name} left [0, 1] by {excess:.2g}: clamp its images")
    passed = attacks.distance(x, images, settings.norm) - attacks.radius(x, eps, settings.norm)
    if not least and (excess := float(passed.max())) > _ROUNDING:
        raise InputError(
            f"the attack {name} passes its budget, {settings.norm} {eps:g}, by {excess:.2g} (raw pixels) on "
            f"{int((passed > _ROUNDING).sum())} of {len(x)} images: project them on the ball"
        )
    return images


def peak_memory_mb() -> float:
    """The most memory that this process has held so far, in MB; on a GPU the most that torch has held there.

    0 where the system does not tell.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
