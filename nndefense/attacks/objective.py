"""One step's work for every gradient attack: one forward pass and one gradient with respect to the images alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nndefense.attacks.checks import check_logits
from nndefense.attacks.losses import Loss
from nndefense.errors import InputError

Model = Callable[[Tensor], Tensor]


def loss_and_gradient(model: Model, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """Give the loss, the logits and the gradient of the loss at ``x``.

    The parameters' gradients are neither computed nor touched. A model that declares
    ``expected_loss(x, y, loss) -> (logits, losses)``, as :class:`nndefense.attacks.Eot` does, is asked for it.

    Args:
        model: images N x C x H x W in [0, 1] -> logits N x K.
        x: images N x C x H x W.
        y: what the loss takes beside the logits: labels N, or clean logits N x K.
        loss: (logits, y) -> N.

    Returns:
        Losses N, logits N x K and gradient N x C x H x W, all detached.

    Raises:
        InputError: a loss that is not one value per image, or an output without a gradient to the images.
    """
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        expected = getattr(model, "expected_loss", None)
        if expected is None:
            logits = model(x)
            losses = loss(logits, y)
        else:
            logits, losses = expected(x, y, loss)
        if losses.shape != x.shape[:1]:
            raise InputError(f"the loss has shape {tuple(losses.shape)}, but must be one value per image ({len(x)})")
        # A one for each image: the gradient of the sum, not the mean, so that none depends on the size of the batch.
        ones = torch.ones_like(losses)
        found = torch.autograd.grad(losses, x, ones, allow_unused=True) if losses.requires_grad else (None,)
    gradient = found[0]
    if gradient is None:
        raise InputError(
            "the model's output carries no gradient to the images (a retrieval is not differentiable): "
            "attack the classifier itself, or a differentiable relaxation of the defence"
        )
    return losses.detach(), logits.detach(), gradient


def checking(loss: Loss) -> Loss:
    """The same loss, which first checks logits and labels: for the first forward pass, so that none is spent on it."""

    def checked(logits: Tensor, y: Tensor) -> Tensor:
        check_logits(logits, y)
        return loss(logits, y)

    return checked


def negated(loss: Loss) -> Loss:
    """The loss that a targeted attack raises: the one towards its target class, with the sign turned."""
    return lambda logits, y: -loss(logits, y)


@torch.no_grad()
def checked_logits(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """One forward pass without gradient, checked against the labels: N x C x H x W -> N x K."""
    logits = model(x)
    check_logits(logits, y)
    return logits


def fooled_by(logits: Tensor, y: Tensor, targeted: bool = False) -> Tensor:
    """Which images reached the attack's goal, N: another class than ``y``, or with ``targeted`` class ``y``."""
    hit = logits.argmax(1) == y
    return hit if targeted else ~hit


def likeliest_others(logits: Tensor, y: Tensor, count: int) -> Tensor:
    """The ``count`` largest logits' classes other than ``y``, largest first: N x K and N -> N x min(count, K - 1)."""
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices
