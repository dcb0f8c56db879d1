"""TRADES: accuracy plus the distance of a prediction from the worst one nearby."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from nndefense.attacks import kl
from nndefense.training.batch import Attack, Batch, Outcome
from nndefense.training.objectives.terms import both_logits, clean_logits, needed, only_labelled


def trades(model: nn.Module, batch: Batch, attack: Attack | None, *, beta: float = 6.0) -> Outcome:
    """TRADES (Zhang et al., ICML 2019), beta = 1 / lambda.

    ``mean_i [ CE(f(x_i), y_i) + beta KL(p(x_i) || p(x'_i)) ]`` with p the softmax of f, and x'_i what the attack finds
    for ``max_{x' in B(x_i)} KL(p(x_i) || p(x'))``: the attack raises the same divergence, not the cross-entropy, and
    sees no label. The mean is over images, not over classes. The gradient runs through both arguments of the
    divergence; x'_i is a constant.

    The clean prediction that the attack moves away from is computed once, in the attack's mode: K steps cost K + 1
    passes. The loss adds two, in training mode.
    """
    only_labelled(batch, "trades")
    attack = needed(attack, "trades")
    reference = clean_logits(model, batch.images, attack)
    attacked = attack(model, batch.images, reference, loss="kl")
    clean, robust = both_logits(model, batch.images, attacked)
    natural = F.cross_entropy(clean, batch.labels)
    boundary = kl(robust, clean).mean()
    return Outcome(
        natural + beta * boundary,
        clean=clean.detach(),
        robust=robust.detach(),
        parts={"clean_loss": natural.detach(), "boundary_loss": boundary.detach()},
    )
