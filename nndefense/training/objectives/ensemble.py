"""Ensemble adversarial training."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from nndefense.errors import InputError
from nndefense.training.batch import Attack, Batch, Outcome
from nndefense.training.ensemble_attack import EnsembleAttack
from nndefense.training.objectives.terms import both_logits, needed, only_labelled


def ensemble_adversarial(model: nn.Module, batch: Batch, attack: Attack | None, *, mix: float = 0.5) -> Outcome:
    """Ensemble adversarial training (Tramer et al., ICLR 2018).

    ``(1-B) mean_i CE(f(x_i), y_i) + B mean_i CE(f(x'_i), y_i)`` with B = ``mix`` = 1/2, as in the authors' code, and
    x' the batch as one net attacks it in a single step: one of the static sources, or f itself, drawn uniformly for
    the batch. The step leads away from what the attacking net predicts, or towards its least likely class (Step-LL,
    the paper's choice on ImageNet); the labels are not used for it, so that none leaks.

    It is meant against attacks carried over from other nets; attacks of many steps on f itself break it.

    Args:
        model: the net.
        batch: labelled images; ``batch.others`` is used where it is given.
        attack: an :class:`nndefense.training.EnsembleAttack`.
        mix: B, 0 to 1.

    Raises:
        InputError: another attack or none, or unlabelled images.
    """
    only_labelled(batch, "ensemble-adversarial")
    attack = needed(attack, "ensemble-adversarial")
    if not isinstance(attack, EnsembleAttack):
        raise InputError(
            "the objective ensemble-adversarial takes an EnsembleAttack(sources, step), where step is such as "
            "InnerAttack.fgsm(eps)"
        )
    attacked = attack(model, batch.images, batch.labels, others=batch.others)
    clean, robust = both_logits(model, batch.images, attacked)
    natural, worst = F.cross_entropy(clean, batch.labels), F.cross_entropy(robust, batch.labels)
    return Outcome(
        (1 - mix) * natural + mix * worst,
        clean=clean.detach(),
        robust=robust.detach(),
        parts={"clean_loss": natural.detach(), "robust_loss": worst.detach()},
    )
