"""Training against rotations and translations."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from nndefense.attacks.spatial import SpatialAttack
from nndefense.errors import InputError
from nndefense.training.batch import Attack, Batch, Outcome
from nndefense.training.objectives.terms import both_logits, only_labelled


def worst_of_10(model: nn.Module, batch: Batch, attack: Attack | None = None, *, mix: float = 0.5) -> Outcome:
    """Worst-of-10 training (Engstrom et al., ICML 2019) as in the code of Raghunathan et al. (ICML 2020).

    ``(1-B) mean_i CE(f(x_i), y_i) + B mean_i CE(f(x'_i), y_i)`` with B = ``mix`` and x'_i the worst of 10 random
    rotations and translations. That code uses B = 1/2; Engstrom et al. train on x'_i alone, B = 1.

    Args:
        model: the net.
        batch: labelled images.
        attack: a :class:`SpatialAttack` of 10 draws; by default the one with the paper's limits.
        mix: B, 0 to 1.
    """
    return _transformed(model, batch, attack, mix, draws=10, name="worst-of-10")


def random_augmentation(model: nn.Module, batch: Batch, attack: Attack | None = None, *, mix: float = 0.5) -> Outcome:
    """Random augmentation with rotations and translations (Yang et al. 2019; Raghunathan et al., ICML 2020).

    The loss of :func:`worst_of_10` with a single draw, which the model is not asked about.

    Args:
        model: the net.
        batch: labelled images.
        attack: a :class:`SpatialAttack` of 1 draw; by default the one with the paper's limits.
        mix: B, 0 to 1.
    """
    return _transformed(model, batch, attack, mix, draws=1, name="random-augmentation")


def _transformed(model: nn.Module, batch: Batch, attack: Attack | None, mix: float, draws: int, name: str) -> Outcome:
    only_labelled(batch, name)
    if attack is None:
        attack = SpatialAttack(draws=draws)
    if not isinstance(attack, SpatialAttack) or attack.draws != draws:
        raise InputError(f"the objective {name} takes a SpatialAttack(draws={draws}), or none for the usual one")
    attacked = attack(model, batch.images, batch.labels)
    clean, robust = both_logits(model, batch.images, attacked)
    natural, worst = F.cross_entropy(clean, batch.labels), F.cross_entropy(robust, batch.labels)
    return Outcome(
        (1 - mix) * natural + mix * worst,
        clean=clean.detach(),
        robust=robust.detach(),
        parts={"clean_loss": natural.detach(), "robust_loss": worst.detach()},
    )
