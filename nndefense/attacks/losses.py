"""What an attack raises, and one step's work: one forward pass and one gradient with respect to the images alone.

Each loss takes logits N x K and labels N and gives N values to be MAXIMISED.

All are unchanged by adding one number to a row of logits, so log-probabilities, which are logits less such a number,
give the same values and gradients. Probabilities do not: :func:`nndefense.attacks.check_logits` refuses them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from nndefense.attacks.checks import check_logits
from nndefense.errors import InputError

#: What an attack is given: images N x C x H x W in [0, 1] -> logits N x classes, with a gradient.
Model = Callable[[Tensor], Tensor]
#: Logits N x classes and labels N (for ``kl``: clean logits N x classes) -> a loss N, larger the nearer the attack is.
Loss = Callable[[Tensor, Tensor], Tensor]

_TINY = 1e-12


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy in nats, ``-log softmax(logits)_y``: ``logits`` N x K and labels ``y`` N -> N, at least 0."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Margin of Carlini and Wagner (S&P 2017, section 5.A, f_6), ``max_{j != y} z_j - z_y``: ``logits``
    z, N x K, and labels ``y``, N -> N.

    It is positive exactly where the label is no longer the largest logit, and does not saturate as cross-entropy
    does on a net that is sure of itself.
    """
    own = y[:, None]
    others: Tensor = logits.scatter(1, own, -torch.inf).amax(1)
    return others - logits.gather(1, own)[:, 0]


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein, ICML 2020, section 4.1): N x K and N -> N, at least -1.

    ``-(z_y - max_{j != y} z_j) / (z_(1) - z_(3))`` with z sorted downwards. It does not change when the logits are
    scaled, so a net cannot hide its gradients by being scaled up.

    Raises:
        InputError: fewer than 3 classes.
    """
    _classes(logits, 3, "dlr")
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + _TINY)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted difference of logits ratio (Croce and Hein, ICML 2020, section 4.1): N x K, N and N -> N.

    ``-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)``: raising it carries an image of class y towards class t.

    Args:
        logits: N x K, K at least 4.
        y: true labels N.
        target: classes N that the attack heads for.

    Raises:
        InputError: fewer than 4 classes.
    """
    _classes(logits, 4, "targeted_dlr")
    top = logits.topk(4, dim=1).values
    gap = logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])
    return gap[:, 0] / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _TINY)


def kl(logits: Tensor, clean: Tensor) -> Tensor:
    """KL divergence from the clean to the attacked prediction, in nats (Zhang et al., ICML 2019, section 3.2).

    ``sum_k p_k log(p_k / q_k)`` with p the softmax of the clean logits and q that of ``logits``: no label is needed.
    Its gradient at the clean image is 0, so an attack that raises it starts elsewhere.

    Args:
        logits: logits of the attacked images, N x K.
        clean: logits of the clean images, N x K; they take the place of the labels.

    Returns:
        N values, at least 0.
    """
    attacked, reference = logits.log_softmax(1), clean.log_softmax(1)
    return F.kl_div(attacked, reference, reduction="none", log_target=True).sum(1)


#: The losses by name. ``kl`` takes clean logits instead of labels; the attacks that offer it provide them.
LOSSES: dict[str, Loss] = {"cross-entropy": cross_entropy, "margin": margin, "dlr": dlr, "kl": kl}


def find_loss(loss: str | Loss) -> Loss:
    """Give a loss by its name in :data:`LOSSES`; a callable (logits N x K, labels N) -> N is taken as it is.

    Raises:
        InputError: an unknown name.
    """
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise InputError(f"loss is {loss!r}, but must be one of {', '.join(LOSSES)}, or a callable")
    return LOSSES[loss]


def _classes(logits: Tensor, least: int, name: str) -> None:
    if logits.shape[1] < least:
        raise InputError(
            f"{name} needs at least {least} classes, but the model has {logits.shape[1]}: use loss='margin'"
        )


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
        gradient = gradient_to(x, losses, ones)
    return losses.detach(), logits.detach(), gradient


def gradient_to(x: Tensor, value: Tensor, weights: Tensor | None = None, *, keep: bool = False) -> Tensor:
    """The gradient of ``value`` to the images ``x``, in their shape.

    Args:
        x: the images, a leaf that requires its gradient.
        value: made from them: one number, or several with a weight each.
        weights: of the numbers.
        keep: the graph, for another call.

    Raises:
        InputError: there is none.
    """
    found: Tensor | None = None
    if value.requires_grad:
        found = torch.autograd.grad(value, x, weights, retain_graph=keep, allow_unused=True)[0]
    if found is None:
        raise InputError(
            "the model's output carries no gradient to the images (a retrieval is not differentiable, nor is a "
            "quantised net): attack the classifier itself, before it was quantised, or a differentiable relaxation of "
            "the defence"
        )
    return found


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


def least_likely_other(logits: Tensor, y: Tensor) -> Tensor:
    """The class of the smallest logit but ``y``, what an attack that aims as far as it can heads for: N x K, N -> N."""
    return logits.scatter(1, y[:, None], torch.inf).argmin(1)


def likeliest_others(logits: Tensor, y: Tensor, count: int) -> Tensor:
    """The ``count`` largest logits' classes other than ``y``, largest first: N x K and N -> N x min(count, K - 1)."""
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices
