"""FGSM and PGD with their relatives, on anything that is callable from images to logits.

A step costs one forward pass and one gradient with respect to the images alone: the parameters' gradients are
neither computed nor touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nndefense.attacks import losses, norms
from nndefense.attacks.checks import at_least, checked_inputs
from nndefense.attacks.door import any_type
from nndefense.attacks.losses import Loss, Model, fooled_by, loss_and_gradient
from nndefense.errors import InputError
from nndefense.memory import reusing_memory


@any_type
def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    targeted: bool = False,
    loss: str | Loss = "cross-entropy",
) -> Tensor:
    """Fast gradient sign method (Goodfellow et al., ICLR 2015, section 4): one step of length eps.

    ``x' = clip(x + eps * sign(grad_x L(model(x), y)), 0, 1)``; in the l2 norms the sign becomes the unit gradient.

    ``model``, ``x``, ``y``, ``eps``, ``norm``, result and errors are as for :func:`pgd`.

    Args:
        targeted: step towards ``y`` instead of away from it.
        loss: a name in :data:`nndefense.attacks.LOSSES` except ``kl``, or a callable (logits, y) -> N.

    Returns:
        The attacked images: same shape, dtype and device as ``x``, in [0, 1] and inside the ball.
    """
    radii = checked_inputs(model, x, y, eps, norm)
    objective = losses.find_loss(loss)
    if objective is losses.kl:
        raise InputError("the gradient of the KL divergence is 0 at the clean image: use pgd with a random start")
    if targeted:
        objective = losses.negated(objective)
    x = x.detach()
    _, _, gradient = loss_and_gradient(model, x, y, losses.checking(objective))
    return norms.projector(x, radii, norm)(x + norms.steepest(gradient, norm) * norms.per_image(radii, x))


@any_type
@reusing_memory
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
    loss: str | Loss = "cross-entropy",
    momentum: float = 0.0,
    exact_projection: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient descent (Madry et al., ICLR 2018, section 2.1), with I-FGSM and MI-FGSM as settings.

    ``x_{t+1} = P(x_t + step_size * g)`` with g the sign of the gradient (linf) or the unit gradient (l2), and P the
    projection on the ball around ``x``, then on [0, 1]. Each image keeps the restart that fools the model, else the
    one of highest loss, and only images that still stand are attacked again.

    * I-FGSM (Kurakin et al., ICLR Workshop 2017, section 2.2): ``random_start=False``.
    * MI-FGSM (Dong et al., CVPR 2018, section 3.1): ``momentum=1.0, random_start=False, step_size=eps / steps``;
      ``g <- momentum * g + grad / ||grad||_1``.

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
        loss: a name in :data:`nndefense.attacks.LOSSES`, or a callable (logits, y) -> N. ``kl`` raises the
            divergence from the clean prediction; it needs ``random_start`` and cannot be targeted.
        momentum: decay factor mu of MI-FGSM, at least 0; 0 is plain PGD.
        exact_projection: P is the projection on the ball's intersection with [0, 1] instead, which in the l2 norms
            reaches farther where many pixels are at a bound.
        generator: source of the random starts, on any device.

    Returns:
        The attacked images: same shape, dtype and device as ``x``, in [0, 1] and inside the ball.

    Raises:
        InputError: images, labels or settings that cannot be used, a model in training mode, one that returns
            probabilities, or one without a gradient.
    """
    radii = checked_inputs(model, x, y, eps, norm)
    at_least("steps", steps)
    at_least("restarts", restarts)
    if restarts > 1 and not random_start:
        raise InputError("restarts without a random start all take the same path: turn random_start on")
    if not 0 <= momentum < float("inf"):
        raise InputError(f"momentum is {momentum}, but must be finite and at least 0")
    objective = losses.find_loss(loss)
    if objective is losses.kl and (targeted or not random_start):
        raise InputError("the KL divergence knows no target and is flat at the clean image: use it with random_start")
    stride = radii * (2.5 / steps) if step_size is None else norms.in_pixels(x, step_size, norm)
    x = x.detach()
    goal = losses.checked_logits(model, x, y) if objective is losses.kl else y
    objective = losses.negated(objective) if targeted else objective

    def ascend(x: Tensor, goal: Tensor, radii: Tensor, stride: Tensor, first: Loss) -> Tensor:
        """One run from x or from a random start, N x C x H x W -> N x C x H x W; ``first`` is the first step's loss."""
        stride, inside = norms.per_image(stride, x), norms.projector(x, radii, norm, exact=exact_projection)
        attacked = inside(x + norms.random_in_ball(x, radii, norm, generator)) if random_start else x
        velocity: Tensor | None = None
        for step in range(steps):
            _, _, gradient = loss_and_gradient(model, attacked, goal, objective if step else first)
            if momentum:
                gradient = norms.unit_l1(gradient)
                velocity = gradient if velocity is None else momentum * velocity + gradient
                gradient = velocity
            attacked = inside(torch.addcmul(attacked, stride, norms.steepest(gradient, norm)))
        return attacked

    first = losses.checking(objective) if goal is y else objective
    if restarts == 1:
        return ascend(x, goal, radii, stride, first)

    best, best_loss, standing = x.clone(), torch.full_like(radii, -torch.inf), torch.arange(len(x), device=x.device)
    for _ in range(restarts):
        here = standing
        attacked = ascend(x[here], goal[here], radii[here], stride[here], first)
        first = objective
        with torch.no_grad():
            logits = model(attacked)
            reached, fooled = objective(logits, goal[here]), fooled_by(logits, y[here], targeted)
        better = fooled | (reached > best_loss[here])
        best[here[better]], best_loss[here[better]] = attacked[better], reached[better]
        standing = here[~fooled]
        if len(standing) == 0:
            break
    return best
