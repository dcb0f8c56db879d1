"""Objectives on labelled images and on others with the pseudo-labels of a standard teacher.

Raghunathan et al., "Understanding and mitigating the tradeoff between robustness and accuracy" (ICML 2020);
Carmon et al., "Unlabeled data improves adversarial robustness" (NeurIPS 2019). An image without a label has its
pseudo-label in the place of the label, for the loss and for the attack.
"""

from __future__ import annotations

from torch import nn

from nndefense.attacks import kl
from nndefense.training.batch import Batch, BatchAttack, Outcome
from nndefense.training.objectives.registry import SHARE, WEIGHT, entered
from nndefense.training.objectives.terms import (
    both_logits,
    cross_entropies,
    drawn_apart,
    labelled_mask,
    mean_over,
    mixed_mean,
    needed,
    outcome,
)


@entered(
    "self-training",
    "cross-entropy of labels and pseudo-labels",
    {"std_unlabelled": SHARE},
    attack=False,
    unlabelled=True,
)
def self_training(
    model: nn.Module, batch: Batch, attack: BatchAttack | None = None, *, std_unlabelled: float = 0.9
) -> Outcome:
    """Standard self-training, the row without robustness of Raghunathan et al. (ICML 2020): :func:`rst_at` with B = 0.

    ``[ (1-a) sum_lab CE(f(x), y) + a sum_unl CE(f(x), y~) ] / [ (1-a) n_lab + a n_unl ]`` with a =
    ``std_unlabelled``. ``attack`` is not used.
    """
    labelled = labelled_mask(batch, "self-training")
    clean = model(batch.images)
    return Outcome(mixed_mean(cross_entropies(clean, batch.labels), labelled, std_unlabelled), clean=clean.detach())


@entered(
    "rst",
    "robust self-training with four free weights",
    dict.fromkeys(("std_labelled", "rob_labelled", "std_unlabelled", "rob_unlabelled"), WEIGHT),
    unlabelled=True,
)
def rst(
    model: nn.Module,
    batch: Batch,
    attack: BatchAttack | None,
    *,
    std_labelled: float = 0.05,
    rob_labelled: float = 0.25,
    std_unlabelled: float = 0.45,
    rob_unlabelled: float = 0.25,
) -> Outcome:
    """Robust self-training in its general form (Raghunathan et al., ICML 2020): four weighted means.

    ``alpha mean_lab CE(f(x), y) + beta mean_lab CE(f(x'), y) + gamma mean_unl CE(f(x), y~) + lambda mean_unl
    CE(f(x'), y~)``, alpha to lambda being ``std_labelled``, ``rob_labelled``, ``std_unlabelled``, ``rob_unlabelled``,
    with y~ the pseudo-labels. The defaults are those of
    :func:`rst_at` where a batch has as many labelled as unlabelled images. A mean over no images is 0.
    """
    labelled = labelled_mask(batch, "rst")
    attacked = needed(attack, "rst")(model, batch.images, batch.labels)
    clean, robust = both_logits(model, batch.images, attacked)
    standard, worst = cross_entropies(clean, batch.labels), cross_entropies(robust, batch.labels)
    parts = {
        "clean_loss_labelled": mean_over(standard, labelled),
        "robust_loss_labelled": mean_over(worst, labelled),
        "clean_loss_unlabelled": mean_over(standard, ~labelled),
        "robust_loss_unlabelled": mean_over(worst, ~labelled),
    }
    weights = (std_labelled, rob_labelled, std_unlabelled, rob_unlabelled)
    loss = sum((weight * part for weight, part in zip(weights, parts.values(), strict=True)), clean.new_zeros(()))
    return outcome(loss, clean, robust, **parts)


@entered(
    "rst-at",
    "robust self-training with adversarial training (Raghunathan et al. 2020)",
    dict.fromkeys(("mix", "std_unlabelled", "rob_unlabelled"), SHARE),
    unlabelled=True,
)
def rst_at(
    model: nn.Module,
    batch: Batch,
    attack: BatchAttack | None,
    *,
    mix: float = 0.5,
    std_unlabelled: float = 0.9,
    rob_unlabelled: float = 0.5,
) -> Outcome:
    """Robust self-training with adversarial training, as in the code of Raghunathan et al. (ICML 2020).

    ``(1-B) Nat + B Rob`` with B = ``mix``, ``Nat = [ (1-a) sum_lab CE(f(x), y) + a sum_unl CE(f(x), y~) ] /
    [ (1-a) n_lab + a n_unl ]`` with a = ``std_unlabelled``, and Rob the same on attacked images with b =
    ``rob_unlabelled`` in the place of a. With as many labelled as unlabelled images the four means weigh
    0.05, 0.45, 0.25 and 0.25 (standard labelled and unlabelled, robust labelled and unlabelled).

    With a :class:`nndefense.attacks.SpatialAttack` of 10 draws or of 1 it is the paper's RST + worst-of-10 or
    RST + random augmentation.
    """
    labelled = labelled_mask(batch, "rst-at")
    attacked = needed(attack, "rst-at")(model, batch.images, batch.labels)
    clean, robust = both_logits(model, batch.images, attacked)
    natural = mixed_mean(cross_entropies(clean, batch.labels), labelled, std_unlabelled)
    worst = mixed_mean(cross_entropies(robust, batch.labels), labelled, rob_unlabelled)
    return outcome((1 - mix) * natural + mix * worst, clean, robust, clean_loss=natural, robust_loss=worst)


@entered(
    "rst-trades",
    "robust self-training with TRADES (Carmon et al. 2019)",
    {"beta": WEIGHT, "unlabelled": SHARE},
    unlabelled=True,
)
def rst_trades(
    model: nn.Module, batch: Batch, attack: BatchAttack | None, *, beta: float = 6.0, unlabelled: float = 0.5
) -> Outcome:
    """Robust self-training with TRADES (Carmon et al., NeurIPS 2019).

    ``mean_i [ CE(f(x_i), y_i) + beta KL(p(x_i) || p(x'_i)) ]`` over labelled and unlabelled images, with
    pseudo-labels where there are no labels. A labelled image weighs 1 - u in the mean and an unlabelled one u =
    ``unlabelled``; the paper's 1/2 makes it the plain mean. Everything else is as in
    :func:`nndefense.training.objectives.trades`.
    """
    labelled = labelled_mask(batch, "rst-trades")
    clean, robust = drawn_apart(model, batch, attack, "rst-trades")
    natural = mixed_mean(cross_entropies(clean, batch.labels), labelled, unlabelled)
    boundary = mixed_mean(kl(robust, clean), labelled, unlabelled)
    return outcome(natural + beta * boundary, clean, robust, clean_loss=natural, boundary_loss=boundary)


@entered("robust-consistency", "labels where there are some, stability everywhere", {"beta": WEIGHT}, unlabelled=True)
def robust_consistency(model: nn.Module, batch: Batch, attack: BatchAttack | None, *, beta: float = 6.0) -> Outcome:
    """Robust consistency training: labels for the labelled images, stability for all, and no pseudo-labels.

    ``mean_lab CE(f(x), y) + beta mean_all KL(p(x) || p(x'))``: the robust form of virtual adversarial training (Miyato
    et al., TPAMI 2018) that Carmon et al. (NeurIPS 2019) compare with. Their weight is not known here; 6 is that of
    TRADES.
    """
    labelled = labelled_mask(batch, "robust-consistency")
    clean, robust = drawn_apart(model, batch, attack, "robust-consistency")
    natural = mean_over(cross_entropies(clean, batch.labels), labelled)
    boundary = kl(robust, clean).mean()
    return outcome(natural + beta * boundary, clean, robust, clean_loss=natural, boundary_loss=boundary)
