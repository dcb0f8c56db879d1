"""Interpolated adversarial training: mixup of clean images, and of attacked ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nndefense.training.batch import Attack, Batch, Outcome
from nndefense.training.objectives.terms import needed, only_labelled


def interpolated(model: nn.Module, batch: Batch, attack: Attack | None, *, alpha: float = 1.0) -> Outcome:
    """Interpolated adversarial training (Lamb et al., AISec 2019, algorithm 1).

    ``1/2 M(x, y) + 1/2 M(x', y)``, with x' the attacked images (attacked before they are mixed) and M the mixup loss
    (Zhang et al., ICLR 2018): ``M(x, y) = mean_i [ r CE(f(m_i), y_i) + (1-r) CE(f(m_i), y_s(i)) ]`` for
    ``m_i = r x_i + (1-r) x_s(i)``, one ratio r ~ Beta(alpha, alpha) and one permutation s a batch, drawn anew for the
    clean and for the attacked images. ``alpha=0`` mixes nothing.

    No image goes through the net as it is, so no accuracies are reported.
    """
    only_labelled(batch, "interpolated")
    attacked = needed(attack, "interpolated")(model, batch.images, batch.labels)
    clean_loss = _mixup(model, batch.images, batch.labels, alpha)
    robust_loss = _mixup(model, attacked, batch.labels, alpha)
    return Outcome(
        0.5 * clean_loss + 0.5 * robust_loss,
        parts={"clean_loss": clean_loss.detach(), "robust_loss": robust_loss.detach()},
    )


def _mixup(model: nn.Module, images: Tensor, labels: Tensor, alpha: float) -> Tensor:
    ratio = float(torch.distributions.Beta(alpha, alpha).sample()) if alpha else 1.0
    # Drawn on the CPU like the ratio, so that the permutation is the same on every device.
    other = torch.randperm(len(images)).to(images.device)
    logits = model(torch.lerp(images[other], images, ratio))
    return ratio * F.cross_entropy(logits, labels) + (1 - ratio) * F.cross_entropy(logits, labels[other])
