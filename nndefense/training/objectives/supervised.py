"""Objectives on labelled images alone: standard, half-half and adversarial training."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from nndefense.errors import InputError
from nndefense.training.batch import Attack, Batch, Outcome
from nndefense.training.objectives.terms import both_logits, needed, only_labelled

MIXES = ("batch", "loss")


def standard(model: nn.Module, batch: Batch, attack: Attack | None = None) -> Outcome:
    """Standard training: ``mean_i CE(f(x_i), y_i)``, the cross-entropy in nats of the images as they are.

    ``attack`` is not used.
    """
    only_labelled(batch, "standard")
    clean = model(batch.images)
    return Outcome(F.cross_entropy(clean, batch.labels), clean=clean.detach())


def adversarial(model: nn.Module, batch: Batch, attack: Attack | None) -> Outcome:
    """Adversarial training (Madry et al., ICLR 2018, eq. 2.1): attacked images alone.

    ``mean_i CE(f(x'_i), y_i)``, where x'_i is what the attack finds for ``max_{x' in B(x_i)} CE(f(x'), y_i)``. What
    the code of Raghunathan et al. (ICML 2020) calls adversarial training is not this, but half of it and half of the
    standard loss: :func:`half_half` with ``mix="loss"``.
    """
    only_labelled(batch, "adversarial")
    attacked = needed(attack, "adversarial")(model, batch.images, batch.labels)
    robust = model(attacked)
    return Outcome(F.cross_entropy(robust, batch.labels), robust=robust.detach())


def half_half(model: nn.Module, batch: Batch, attack: Attack | None, *, mix: str = "batch") -> Outcome:
    """Half-half training (Tsipras et al., ICLR 2019): an even mix of clean and attacked images.

    The paper does not say which mix, so here are both:

    * ``mix="batch"``: the first half of the batch (rounded down) is attacked, the rest is not, and one pass sees
      both: ``mean_i CE(f(z_i), y_i)`` with z_i = x'_i or x_i. Batch normalisation mixes the two kinds.
    * ``mix="loss"``: ``1/2 mean_i CE(f(x_i), y_i) + 1/2 mean_i CE(f(x'_i), y_i)``, as in Goodfellow et al. (ICLR 2015,
      section 6) with a = 1/2. Each kind is normalised by its own statistics.

    Batches come in random order, so that the first half is a random one.

    Raises:
        InputError: an unknown mix, no attack, or unlabelled images.
    """
    only_labelled(batch, "half-half")
    attack = needed(attack, "half-half")
    if mix == "loss":
        attacked = attack(model, batch.images, batch.labels)
        clean, robust = both_logits(model, batch.images, attacked)
        clean_loss, robust_loss = F.cross_entropy(clean, batch.labels), F.cross_entropy(robust, batch.labels)
        return Outcome(
            0.5 * clean_loss + 0.5 * robust_loss,
            clean=clean.detach(),
            robust=robust.detach(),
            parts={"clean_loss": clean_loss.detach(), "robust_loss": robust_loss.detach()},
        )
    if mix != "batch":
        raise InputError(f"mix is {mix!r}, but must be one of {', '.join(MIXES)}")
    half = len(batch.labels) // 2
    attacked = batch.images[:half]
    if half:
        attacked = attack(model, attacked, batch.labels[:half])
    logits = model(torch.cat([attacked, batch.images[half:]]))
    right = (logits.detach().argmax(1) == batch.labels).float()
    parts = {"clean_accuracy": right[half:].mean()}
    if half:
        parts["robust_accuracy"] = right[:half].mean()
    return Outcome(F.cross_entropy(logits, batch.labels), parts=parts)
