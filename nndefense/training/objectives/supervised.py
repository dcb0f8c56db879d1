"""Objectives on labelled images alone.

Each is called with the net, a batch of labelled images, and the attack that gives x'; it raises :class:`InputError` for
unlabelled images, and where it needs an attack and has none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nndefense.attacks import kl
from nndefense.attacks.spatial import SpatialAttack
from nndefense.errors import InputError, check_choice
from nndefense.training.batch import Batch, BatchAttack, Outcome
from nndefense.training.ensemble_attack import EnsembleAttack
from nndefense.training.objectives.registry import SHARE, WEIGHT, entered
from nndefense.training.objectives.terms import both_logits, drawn_apart, mixed_losses, needed, only_labelled, outcome

MIXES = ("batch", "loss")
PASSES = ("joint", "separate")
#: The weight of the pairing in the examples of the authors' code, and the default here.
EXAMPLES_WEIGHT = 0.5
#: The weight that the authors' released checkpoints for ImageNet carry in their name.
IMAGENET_WEIGHT = 0.25


@entered("standard", "cross-entropy of the images as they are", attack=False)
def standard(model: nn.Module, batch: Batch, attack: BatchAttack | None = None) -> Outcome:
    """Standard training: ``mean_i CE(f(x_i), y_i)``, the cross-entropy in nats of the images as they are.

    ``attack`` is not used.
    """
    only_labelled(batch, "standard")
    clean = model(batch.images)
    return Outcome(F.cross_entropy(clean, batch.labels), clean=clean.detach())


@entered("half-half", "half clean and half attacked images", {"mix": MIXES})
def half_half(model: nn.Module, batch: Batch, attack: BatchAttack | None, *, mix: str = "batch") -> Outcome:
    """Half-half training (Tsipras et al., ICLR 2019): an even mix of clean and attacked images.

    The paper does not say which mix, so here are both:

    * ``mix="batch"``: the first half of the batch (rounded down) is attacked, the rest is not, and one pass sees
      both: ``mean_i CE(f(z_i), y_i)`` with z_i = x'_i or x_i. Batch normalisation mixes the two kinds.
    * ``mix="loss"``: ``1/2 mean_i CE(f(x_i), y_i) + 1/2 mean_i CE(f(x'_i), y_i)``, as in Goodfellow et al. (ICLR 2015,
      section 6) with a = 1/2. Each kind is normalised by its own statistics.

    Batches come in random order, so that the first half is a random one.

    Raises:
        InputError: an unknown mix.
    """
    only_labelled(batch, "half-half")
    attack = needed(attack, "half-half")
    if mix == "loss":
        return mixed_losses(model, batch, attack(model, batch.images, batch.labels), 0.5)
    check_choice("mix", mix, MIXES)
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


@entered("adversarial", "attacked images alone (Madry et al. 2018)")
def adversarial(model: nn.Module, batch: Batch, attack: BatchAttack | None) -> Outcome:
    """Adversarial training (Madry et al., ICLR 2018, eq. 2.1): attacked images alone.

    ``mean_i CE(f(x'_i), y_i)``, where x'_i is what the attack finds for ``max_{x' in B(x_i)} CE(f(x'), y_i)``. What
    the code of Raghunathan et al. (ICML 2020) calls adversarial training is not this, but half of it and half of the
    standard loss: :func:`half_half` with ``mix="loss"``.
    """
    only_labelled(batch, "adversarial")
    attacked = needed(attack, "adversarial")(model, batch.images, batch.labels)
    robust = model(attacked)
    return Outcome(F.cross_entropy(robust, batch.labels), robust=robust.detach())


@entered("trades", "cross-entropy plus beta times the divergence under attack (Zhang et al. 2019)", {"beta": WEIGHT})
def trades(model: nn.Module, batch: Batch, attack: BatchAttack | None, *, beta: float = 6.0) -> Outcome:
    """TRADES (Zhang et al., ICML 2019), beta = 1 / lambda.

    ``mean_i [ CE(f(x_i), y_i) + beta KL(p(x_i) || p(x'_i)) ]`` with p the softmax of f, and x'_i what the attack finds
    for ``max_{x' in B(x_i)} KL(p(x_i) || p(x'))``: the attack raises the same divergence, not the cross-entropy, and
    sees no label. The mean is over images, not over classes. The gradient runs through both arguments of the
    divergence; x'_i is a constant.

    The clean prediction that the attack moves away from is computed once, in the attack's mode: K steps cost K + 1
    passes. The loss adds two, in training mode.
    """
    only_labelled(batch, "trades")
    clean, robust = drawn_apart(model, batch, attack, "trades")
    natural, boundary = F.cross_entropy(clean, batch.labels), kl(robust, clean).mean()
    return outcome(natural + beta * boundary, clean, robust, clean_loss=natural, boundary_loss=boundary)


@entered("interpolated", "mixup of clean and of attacked images (Lamb et al. 2019)", {"alpha": WEIGHT})
def interpolated(model: nn.Module, batch: Batch, attack: BatchAttack | None, *, alpha: float = 1.0) -> Outcome:
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
    loss = 0.5 * clean_loss + 0.5 * robust_loss
    return outcome(loss, None, None, clean_loss=clean_loss, robust_loss=robust_loss)


def _mixup(model: nn.Module, images: Tensor, labels: Tensor, alpha: float) -> Tensor:
    ratio = float(torch.distributions.Beta(alpha, alpha).sample()) if alpha else 1.0
    # Drawn on the CPU like the ratio, so that the permutation is the same on every device.
    other = torch.randperm(len(images)).to(images.device)
    logits = model(torch.lerp(images[other], images, ratio))
    return ratio * F.cross_entropy(logits, labels) + (1 - ratio) * F.cross_entropy(logits, labels[other])


@entered(
    "ensemble-adversarial",
    "half clean images, half attacked by one of several nets (Tramer et al. 2018)",
    {"mix": SHARE},
)
def ensemble_adversarial(model: nn.Module, batch: Batch, attack: BatchAttack | None, *, mix: float = 0.5) -> Outcome:
    """Ensemble adversarial training (Tramer et al., ICLR 2018).

    ``(1-B) mean_i CE(f(x_i), y_i) + B mean_i CE(f(x'_i), y_i)`` with B = ``mix`` = 1/2, as in the authors' code, and
    x' the batch as one net attacks it in a single step: one of the static sources, or f itself, drawn uniformly for
    the batch. The step leads away from what the attacking net predicts, or towards its least likely class (Step-LL,
    the paper's choice on ImageNet); the labels are not used for it, so that none leaks.

    It is meant against attacks carried over from other nets; attacks of many steps on f itself break it.

    Args:
        batch: ``batch.others`` is used where it is given.
        attack: an :class:`nndefense.training.EnsembleAttack`.
        mix: B, 0 to 1.

    Raises:
        InputError: another attack.
    """
    only_labelled(batch, "ensemble-adversarial")
    attack = needed(attack, "ensemble-adversarial")
    if not isinstance(attack, EnsembleAttack):
        raise InputError(
            "the objective ensemble-adversarial takes an EnsembleAttack(sources, step), where step is such as "
            "InnerAttack.fgsm(eps)"
        )
    attacked = attack(model, batch.images, batch.labels, others=batch.others)
    return mixed_losses(model, batch, attacked, mix)


@entered(
    "alp",
    "cross-entropy, and the logits of clean and attacked images drawn together (Kannan et al. 2018)",
    {"pairing": WEIGHT, "smoothing": SHARE, "passes": PASSES},
)
def alp(
    model: nn.Module,
    batch: Batch,
    attack: BatchAttack | None,
    *,
    pairing: float = EXAMPLES_WEIGHT,
    smoothing: float = 0.1,
    passes: str = "joint",
) -> Outcome:
    """Adversarial logit pairing (Kannan, Kurakin and Goodfellow, "Adversarial logit pairing", 2018).

    ``mean CE([f(x); f(x')], [y; y]) + pairing * mean_ik (f(x_i)_k - f(x'_i)_k)^2`` with the labels smoothed: the mean
    of the cross-entropy is over clean and attacked images together, that of the squares over images and classes, as in
    the authors' code. Their paper writes the distance of two logit vectors, of which ``pairing`` times the number of
    classes is the weight. Weight decay is a setting of the training. The gradient runs through both kinds of logits;
    x' is a constant.

    Neither this nor :func:`clp` is a defence that holds: Engstrom, Ilyas and Athalye (2018) bring this one on ImageNet
    to 0.1 % by steps away from the label, and Mosbach et al. (2018) clean logit pairing on MNIST and CIFAR-10. They are
    here because the papers compare with them.

    The authors' attack is PGD towards the least likely class in evaluation mode:
    ``InnerAttack(eps=16 / 255, steps=10, step_size=2 / 255, target="least-likely")``. Any other will do, such as
    :meth:`InnerAttack.fgsm`.

    Args:
        pairing: 0.5 (:data:`EXAMPLES_WEIGHT`), or 0.25 (:data:`IMAGENET_WEIGHT`).
        smoothing: share of the label's weight that goes to all classes alike, 0 to 1.
        passes: ``joint`` sends clean and attacked images through the net as one batch, as the authors do;
            ``separate`` normalises each kind by its own statistics. The same where no layer looks at the batch.

    Raises:
        InputError: other passes.
    """
    only_labelled(batch, "alp")
    attacked = needed(attack, "alp")(model, batch.images, batch.labels)
    if passes == "joint":
        clean, robust = model(torch.cat([batch.images, attacked])).chunk(2)
    else:
        check_choice("passes", passes, PASSES)
        clean, robust = both_logits(model, batch.images, attacked)
    natural, worst = (F.cross_entropy(logits, batch.labels, label_smoothing=smoothing) for logits in (clean, robust))
    distance = _squares(clean, robust)
    loss = 0.5 * natural + 0.5 * worst + pairing * distance
    return outcome(loss, clean, robust, clean_loss=natural, robust_loss=worst, pairing_loss=distance)


@entered(
    "clp",
    "cross-entropy, and the logits of pairs of clean images drawn together (Kannan et al. 2018)",
    {"pairing": WEIGHT, "smoothing": SHARE, "noise": WEIGHT},
    attack=False,
)
def clp(
    model: nn.Module,
    batch: Batch,
    attack: BatchAttack | None = None,
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
        pairing, smoothing: as for :func:`alp`.
        noise: standard deviation of Gaussian noise on every image before it is clipped to [0, 1], with which the paper
            combines it; 0 for none. Then no accuracy of clean images is reported.
    """
    only_labelled(batch, "clp")
    images = _noisy(batch.images, noise)
    logits = model(images)
    half = len(images) // 2
    natural = F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
    # A batch of one image has no pair, and the mean over none is no number.
    distance = _squares(logits[:half], logits[half : 2 * half]) if half else natural.new_zeros(())
    seen = None if noise else logits
    return outcome(natural + pairing * distance, seen, None, clean_loss=natural, pairing_loss=distance)


def _squares(first: Tensor, second: Tensor) -> Tensor:
    """The mean square of the difference of two n x K."""
    return (first - second).square().mean()


@entered("noise-augmentation", "cross-entropy of the images under Gaussian noise", {"sigma": WEIGHT}, attack=False)
def noise_augmentation(
    model: nn.Module, batch: Batch, attack: BatchAttack | None = None, *, sigma: float = 0.25
) -> Outcome:
    """Training under noise, for a net that is to be smoothed (Cohen et al., ICML 2019, section 3.3).

    ``mean_i CE(f(x_i + e_i), y_i)`` with e_i Gaussian of standard deviation ``sigma``, in pixels of [0, 1], and the sum
    clipped to [0, 1] as :mod:`nndefense.certificates` clips it. ``attack`` is not used, and no clean image is seen.
    """
    only_labelled(batch, "noise-augmentation")
    return Outcome(F.cross_entropy(model(_noisy(batch.images, sigma)), batch.labels))


def _noisy(images: Tensor, sigma: float) -> Tensor:
    """Images under Gaussian noise, clipped to [0, 1]; for 0 they themselves."""
    return (images + sigma * torch.randn_like(images)).clamp(0, 1) if sigma else images


@entered("worst-of-10", "the worst of 10 rotations and translations", {"mix": SHARE}, attack=False)
def worst_of_10(model: nn.Module, batch: Batch, attack: BatchAttack | None = None, *, mix: float = 0.5) -> Outcome:
    """Worst-of-10 training (Engstrom et al., ICML 2019) as in the code of Raghunathan et al. (ICML 2020).

    ``(1-B) mean_i CE(f(x_i), y_i) + B mean_i CE(f(x'_i), y_i)`` with B = ``mix`` and x'_i the worst of 10 random
    rotations and translations. That code uses B = 1/2; Engstrom et al. train on x'_i alone, B = 1.

    Args:
        attack: a :class:`SpatialAttack` of 10 draws; by default the one with the paper's limits.
        mix: B, 0 to 1.
    """
    return _transformed(model, batch, attack, mix, draws=10, name="worst-of-10")


@entered("random-augmentation", "one random rotation and translation", {"mix": SHARE}, attack=False)
def random_augmentation(
    model: nn.Module, batch: Batch, attack: BatchAttack | None = None, *, mix: float = 0.5
) -> Outcome:
    """Random augmentation with rotations and translations (Yang et al. 2019; Raghunathan et al., ICML 2020).

    The loss of :func:`worst_of_10` with a single draw, which the model is not asked about.

    Args:
        attack: a :class:`SpatialAttack` of 1 draw; by default the one with the paper's limits.
        mix: B, 0 to 1.
    """
    return _transformed(model, batch, attack, mix, draws=1, name="random-augmentation")


def _transformed(
    model: nn.Module, batch: Batch, attack: BatchAttack | None, mix: float, draws: int, name: str
) -> Outcome:
    only_labelled(batch, name)
    if attack is None:
        attack = SpatialAttack(draws=draws)
    if not isinstance(attack, SpatialAttack) or attack.draws != draws:
        raise InputError(f"the objective {name} takes a SpatialAttack(draws={draws}), or none for the usual one")
    return mixed_losses(model, batch, attack(model, batch.images, batch.labels), mix)
