"""Adversarial and clean logit pairing (Kannan, Kurakin and Goodfellow, "Adversarial logit pairing", 2018).

Neither is a defence that holds: Engstrom, Ilyas and Athalye (2018) bring adversarial logit pairing on ImageNet to 0.1 %
by steps away from the label, and Mosbach et al. (2018) clean logit pairing on MNIST and CIFAR-10. They are here because
the papers compare with them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nndefense.errors import InputError
from nndefense.training.batch import Attack, Batch, Outcome
from nndefense.training.objectives.terms import both_logits, needed, only_labelled

#: The weight of the pairing in the examples of the authors' code, and the default here.
EXAMPLES_WEIGHT = 0.5
#: The weight that the authors' released checkpoints for ImageNet carry in their name.
IMAGENET_WEIGHT = 0.25
PASSES = ("joint", "separate")


def alp(
    model: nn.Module,
    batch: Batch,
    attack: Attack | None,
    *,
    pairing: float = EXAMPLES_WEIGHT,
    smoothing: float = 0.1,
    passes: str = "joint",
) -> Outcome:
    """Adversarial logit pairing (Kannan et al. 2018).

    ``mean CE([f(x); f(x')], [y; y]) + pairing * mean_ik (f(x_i)_k - f(x'_i)_k)^2`` with the labels smoothed: the mean
    of the cross-entropy is over clean and attacked images together, that of the squares over images and classes, as in
    the authors' code. Their paper writes the distance of two logit vectors, of which ``pairing`` times the number of
    classes is the weight. Weight decay is a setting of the training. The gradient runs through both kinds of logits;
    x' is a constant.

    The authors' attack is PGD towards the least likely class in evaluation mode:
    ``InnerAttack(eps=16 / 255, steps=10, step_size=2 / 255, target="least-likely")``. Any other will do, such as
    :meth:`InnerAttack.fgsm`.

    Args:
        model: the net.
        batch: labelled images.
        attack: gives x'.
        pairing: 0.5 (:data:`EXAMPLES_WEIGHT`), or 0.25 (:data:`IMAGENET_WEIGHT`).
        smoothing: share of the label's weight that goes to all classes alike, 0 to 1.
        passes: ``joint`` sends clean and attacked images through the net as one batch, as the authors do;
            ``separate`` normalises each kind by its own statistics. The same where no layer looks at the batch.

    Raises:
        InputError: no attack, unlabelled images, or other passes.
    """
    only_labelled(batch, "alp")
    attacked = needed(attack, "alp")(model, batch.images, batch.labels)
    if passes == "joint":
        clean, robust = model(torch.cat([batch.images, attacked])).chunk(2)
    elif passes == "separate":
        clean, robust = both_logits(model, batch.images, attacked)
    else:
        raise InputError(f"passes is {passes!r}, but must be one of {', '.join(PASSES)}")
    natural, worst = (F.cross_entropy(logits, batch.labels, label_smoothing=smoothing) for logits in (clean, robust))
    distance = _squares(clean, robust)
    return Outcome(
        0.5 * natural + 0.5 * worst + pairing * distance,
        clean=clean.detach(),
        robust=robust.detach(),
        parts={
            "clean_loss": natural.detach(),
            "robust_loss": worst.detach(),
            "pairing_loss": distance.detach(),
        },
    )


def clp(
    model: nn.Module,
    batch: Batch,
    attack: Attack | None = None,
    *,
    pairing: float = EXAMPLES_WEIGHT,
    smoothing: float = 0.1,
    noise: float = 0.0,
) -> Outcome:
    """Clean logit pairing (Kannan et al. 2018): the logits of two random images are drawn together, whatever they are.

    ``mean_i CE(f(x_i), y_i) + pairing * mean_jk (f(x_j)_k - f(x_{j+n/2})_k)^2``, with the labels smoothed and j over
    the first half of the batch; of an odd number the last image has no partner. Batches come in random order, so that
    pairs are random. ``attack`` is not used.

    Args:
        model: the net.
        batch: labelled images.
        attack: none.
        pairing, smoothing: as for :func:`alp`.
        noise: standard deviation of Gaussian noise on every image before it is clipped to [0, 1], with which the paper
            combines it; 0 for none. Then no accuracy of clean images is reported.

    Raises:
        InputError: unlabelled images.
    """
    only_labelled(batch, "clp")
    images = batch.images
    if noise:
        images = (images + noise * torch.randn_like(images)).clamp(0, 1)
    logits = model(images)
    half = len(images) // 2
    natural = F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
    # A batch of one image has no pair, and the mean over none is no number.
    distance = _squares(logits[:half], logits[half : 2 * half]) if half else natural.new_zeros(())
    return Outcome(
        natural + pairing * distance,
        clean=None if noise else logits.detach(),
        parts={"clean_loss": natural.detach(), "pairing_loss": distance.detach()},
    )


def _squares(first: Tensor, second: Tensor) -> Tensor:
    """The mean square of the difference of two n x K."""
    return (first - second).square().mean()
