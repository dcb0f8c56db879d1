"""What several objectives are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nndefense.attacks.wrappers import attacked_in
from nndefense.errors import InputError
from nndefense.training.batch import Batch, BatchAttack, Outcome


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """``-log softmax(logits)_y`` in nats: N x K and N -> N."""
    return F.cross_entropy(logits, labels, reduction="none")


def both_logits(model: nn.Module, images: Tensor, attacked: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of clean and attacked images, N x K each, from one pass for each kind.

    Each kind is normalised by its own statistics. The clean pass comes last, as in the code of TRADES and of RST: the
    running statistics lean a little towards the later one.
    """
    robust = model(attacked)
    return model(images), robust


def drawn_apart(model: nn.Module, batch: Batch, attack: BatchAttack | None, name: str) -> tuple[Tensor, Tensor]:
    """As :func:`both_logits`, the images attacked by what raises KL(p(x) || p(x')); :class:`InputError` without one.

    The clean prediction that the attack leads away from is that of the mode in which it sees the net (``eval`` if it
    names none).
    """
    attack = needed(attack, name)
    with torch.no_grad(), attacked_in(model, getattr(attack, "mode", "eval")):
        reference = model(batch.images)
    return both_logits(model, batch.images, attack(model, batch.images, reference, loss="kl"))


def outcome(loss: Tensor, clean: Tensor | None, robust: Tensor | None, **parts: Tensor) -> Outcome:
    """The outcome with this loss; everything else is detached."""
    clean, robust = (None if one is None else one.detach() for one in (clean, robust))
    return Outcome(loss, clean, robust, {name: part.detach() for name, part in parts.items()})


def mixed_losses(model: nn.Module, batch: Batch, attacked: Tensor, mix: float) -> Outcome:
    """``(1-B) mean_i CE(f(x_i), y_i) + B mean_i CE(f(x'_i), y_i)`` with B = ``mix`` and x' the attacked images."""
    clean, robust = both_logits(model, batch.images, attacked)
    natural, worst = F.cross_entropy(clean, batch.labels), F.cross_entropy(robust, batch.labels)
    return outcome((1 - mix) * natural + mix * worst, clean, robust, clean_loss=natural, robust_loss=worst)


def mean_over(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of N values over the chosen ones (N booleans); 0 where there are none."""
    weights = chosen.to(values.dtype)
    return (weights * values).sum() / weights.sum().clamp_min(1)


def mixed_mean(values: Tensor, labelled: Tensor, unlabelled_weight: float) -> Tensor:
    """The mean of N values, a labelled image weighing 1 - a and an unlabelled one a = ``unlabelled_weight``.

    ``[(1-a) sum_lab v + a sum_unl v] / [(1-a) n_lab + a n_unl]``; 0 where all weights are 0.
    """
    weights = unlabelled_weight + (1 - 2 * unlabelled_weight) * labelled.to(values.dtype)
    return (weights * values).sum() / weights.sum().clamp_min(torch.finfo(values.dtype).tiny)


def needed(attack: BatchAttack | None, name: str) -> BatchAttack:
    """The attack, or :class:`InputError` where an objective has to do without."""
    if attack is None:
        raise InputError(f"the objective {name} needs an attack: give one, such as InnerAttack(eps=0.1)")
    return attack


def only_labelled(batch: Batch, name: str) -> None:
    """Raise :class:`InputError` for a batch with unlabelled images, which the objective has no term for.

    They could not just be left out of the loss: they would still go through the net and into the statistics of its
    batch normalisation, as they do in the labelled baseline of RST's code.
    """
    if batch.labelled is not None:
        raise InputError(
            f"the objective {name} has no use for unlabelled images: leave them out, or choose self-training, rst, "
            "rst-at or rst-trades"
        )


def labelled_mask(batch: Batch, name: str) -> Tensor:
    """Which images are labelled, N booleans, or :class:`InputError` where no images without labels were given."""
    if batch.labelled is None:
        raise InputError(f"the objective {name} needs unlabelled images with pseudo-labels: give some")
    return batch.labelled
