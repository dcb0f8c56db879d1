"""Gradient attacks on anything that is callable from images to logits.

A step costs one forward pass and one gradient with respect to the images alone: the parameters' gradients are
neither computed nor touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nndefense.attacks import norms
from nndefense.errors import InputError
from nndefense.images import check_images

Model = Callable[[Tensor], Tensor]


def fgsm(
    model: Model, x: Tensor, y: Tensor, *, eps: float | Tensor, norm: str = "linf", targeted: bool = False
) -> Tensor:
    """Fast gradient sign method (Goodfellow et al., ICLR 2015, section 4): one step of length eps.

    ``x' = clip(x + eps * sign(grad_x CE(model(x), y)), 0, 1)``; in the l2 norms the sign becomes the unit gradient.

    Args:
        model: images N x C x H x W in [0, 1] -> logits N x K.
        x: clean images, N x C x H x W in [0, 1].
        y: labels N; with ``targeted`` the classes that the attack aims at.
        eps: radius, one number or one per image; in units of ``norm``.
        norm: ``linf``, ``l2`` or ``normalized-l2``.
        targeted: step towards ``y`` instead of away from it.

    Returns:
        The attacked images: same shape, dtype and device as ``x``, in [0, 1] and inside the ball.

    Raises:
        InputError: images, labels, eps or norm that cannot be used, or a model without a gradient.
    """
    radii = _checked(x, y, eps, norm)
    with _evaluating(model):
        gradient = _gradient(model, x, y, targeted)
    step = norms.project(norms.steepest(gradient, norm) * norms.per_image(radii, x), radii, norm)
    return (x + step).clamp_(0, 1).detach()


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int,
    step_size: float | Tensor | None = None,
    random_start: bool = True,
    restarts: int = 1,
    targeted: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient descent on the cross-entropy (Madry et al., ICLR 2018, section 2.1).

    ``x_{t+1} = P(x_t + step_size * g)`` with g the sign of the gradient (linf) or the unit gradient (l2), and P the
    projection on the ball around ``x``, then on [0, 1]. The box cannot enlarge an l2 perturbation, so one
    projection on each is enough. Each image keeps the restart that fools the model, else the one of highest loss.

    Args:
        model: images N x C x H x W in [0, 1] -> logits N x K.
        x: clean images, N x C x H x W in [0, 1].
        y: labels N; with ``targeted`` the classes that the attack aims at.
        eps: radius, one number or one per image; in units of ``norm``.
        norm: ``linf``, ``l2`` or ``normalized-l2`` (radius ``eps * ||x||_2``).
        steps: gradient steps per restart, at least 1.
        step_size: in units of ``norm`` like eps; default ``2.5 * eps / steps``, which can cross the ball.
        random_start: begin at a uniform draw from the ball instead of at ``x``.
        restarts: independent runs, at least 1; more than one needs ``random_start``.
        targeted: lower the loss towards ``y`` instead of raising it.
        generator: source of the random starts, on any device.

    Returns:
        The attacked images: same shape, dtype and device as ``x``, in [0, 1] and inside the ball.

    Raises:
        InputError: images, labels or settings that cannot be used, or a model without a gradient.
    """
    radii = _checked(x, y, eps, norm)
    if steps < 1:
        raise InputError(f"steps is {steps}, but must be at least 1")
    if restarts < 1:
        raise InputError(f"restarts is {restarts}, but must be at least 1")
    if restarts > 1 and not random_start:
        raise InputError("restarts without a random start all take the same path: turn random_start on")
    stride = radii * (2.5 / steps) if step_size is None else norms.radius(x, step_size, norm)

    best = x.detach().clone()
    best_loss, best_fooled = torch.full_like(radii, -torch.inf), torch.zeros_like(radii, dtype=torch.bool)
    with _evaluating(model):
        for _ in range(restarts):
            attacked = _ascend(model, x.detach(), y, radii, stride, norm, steps, random_start, targeted, generator)
            if restarts == 1:
                return attacked
            loss, fooled = _outcome(model, attacked, y, targeted)
            better = (fooled & ~best_fooled) | ((fooled == best_fooled) & (loss > best_loss))
            best[better], best_loss[better], best_fooled[better] = attacked[better], loss[better], fooled[better]
    return best


def _ascend(
    model: Model,
    x: Tensor,
    y: Tensor,
    radii: Tensor,
    stride: Tensor,
    norm: str,
    steps: int,
    random_start: bool,
    targeted: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """One run of PGD from x or from a random start: N x C x H x W -> N x C x H x W."""
    stride = norms.per_image(stride, x)
    attacked = x
    if random_start:
        attacked = (x + norms.random_in_ball(x, radii, norm, generator)).clamp_(0, 1)
    for _ in range(steps):
        gradient = _gradient(model, attacked, y, targeted)
        moved = attacked + stride * norms.steepest(gradient, norm)
        attacked = (x + norms.project(moved - x, radii, norm)).clamp_(0, 1)
    return attacked


def _gradient(model: Model, x: Tensor, y: Tensor, targeted: bool) -> Tensor:
    """The gradient of the loss that the attack raises, with respect to the images alone: N x C x H x W."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        # The sum, not the mean, so that no image's gradient depends on the size of the batch.
        loss = F.cross_entropy(model(x), y, reduction="sum")
        if not loss.requires_grad:
            raise InputError(
                "the model's output carries no gradient to the images (a retrieval is not differentiable): "
                "attack the classifier itself, or a differentiable relaxation of the defence"
            )
        (gradient,) = torch.autograd.grad(-loss if targeted else loss, x)
    return gradient


@torch.no_grad()
def _outcome(model: Model, attacked: Tensor, y: Tensor, targeted: bool) -> tuple[Tensor, Tensor]:
    """The loss that the attack raised, N, and whether it reached its goal, N."""
    logits = model(attacked)
    losses, hit = F.cross_entropy(logits, y, reduction="none"), logits.argmax(1) == y
    return (-losses, hit) if targeted else (losses, ~hit)


def _checked(x: Tensor, y: Tensor, eps: float | Tensor, norm: str) -> Tensor:
    """Check what every attack is given; return the radii N."""
    check_images(x)
    if y.shape != x.shape[:1] or y.is_floating_point():
        raise InputError(f"labels have shape {tuple(y.shape)}, but must be one class number per image ({len(x)})")
    return norms.radius(x, eps, norm)


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Put a module into evaluation mode, and give every part its own mode back at the end.

    Without it a batch-norm layer in training mode would make each image's attack depend on its batch, and would
    move the running statistics of a model that the caller only lent.
    """
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
