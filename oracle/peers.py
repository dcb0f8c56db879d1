"""The same attack in foolbox, torchattacks and ART: each function takes (net, x, y) and gives attacked images."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import foolbox
    import torchattacks
    from art.attacks import evasion
    from art.estimators.classification import PyTorchClassifier

logging.getLogger("art").setLevel(logging.ERROR)

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


def in_foolbox(attack: Any, eps: float | None) -> Attack:
    """An attack of foolbox; ``eps`` None for attacks of minimum norm."""

    def run(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        _, attacked, _ = attack(model, x, y, epsilons=eps)
        return attacked

    return run


def in_torchattacks(kind: Any, **settings: Any) -> Attack:
    """An attack of torchattacks."""
    return lambda net, x, y: kind(net, **settings)(x, y)


def in_art(kind: Any, **settings: Any) -> Attack:
    """An attack of ART."""

    def run(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        estimator = PyTorchClassifier(
            net, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0.0, 1.0), device_type="cpu"
        )
        # ART draws from NumPy's global state.
        np.random.seed(0)  # noqa: NPY002
        attacked = kind(estimator, verbose=False, **settings).generate(x.numpy(), y=np.eye(10)[y.numpy()])
        return torch.from_numpy(attacked).float()

    return run


def fgsm(norm: str, eps: float) -> dict[str, Attack]:
    """One step of length eps."""
    if norm == "l2":
        return {
            "foolbox": in_foolbox(foolbox.attacks.L2FastGradientAttack(random_start=False), eps),
            "ART": in_art(_FastGradient, norm=2, eps=eps),
        }
    return {
        "foolbox": in_foolbox(foolbox.attacks.LinfFastGradientAttack(random_start=False), eps),
        "torchattacks": in_torchattacks(torchattacks.FGSM, eps=eps),
        "ART": in_art(_FastGradient, norm=np.inf, eps=eps),
    }


def pgd(norm: str, eps: float, step: float, steps: int) -> dict[str, Attack]:
    """Projected gradient descent from the clean image."""
    linf = norm == "linf"
    kind = foolbox.attacks.LinfPGD if linf else foolbox.attacks.L2PGD
    other = torchattacks.PGD if linf else torchattacks.PGDL2
    return {
        "foolbox": in_foolbox(kind(abs_stepsize=step, steps=steps, random_start=False), eps),
        "torchattacks": in_torchattacks(other, eps=eps, alpha=step, steps=steps, random_start=False),
        "ART": in_art(
            evasion.ProjectedGradientDescentPyTorch,
            norm=np.inf if linf else 2,
            eps=eps,
            eps_step=step,
            max_iter=steps,
            num_random_init=0,
            batch_size=1000,
        ),
    }


def apgd(norm: str, eps: float) -> dict[str, Attack]:
    """APGD on the cross-entropy, 100 steps, one start."""
    return {
        "torchattacks": in_torchattacks(
            torchattacks.APGD, norm="Linf" if norm == "linf" else "L2", eps=eps, steps=100, n_restarts=1
        ),
        "ART": in_art(
            evasion.AutoProjectedGradientDescent,
            norm=np.inf if norm == "linf" else 2,
            eps=eps,
            eps_step=2 * eps,
            max_iter=100,
            nb_random_init=1,
            batch_size=1000,
            loss_type="cross_entropy",
        ),
    }


def autoattack(norm: str, eps: float) -> dict[str, Attack]:
    """The standard version of AutoAttack with the paper's 100 steps; ``torchattacks.AutoAttack`` itself makes 10."""
    common = {"norm": "Linf" if norm == "linf" else "L2", "eps": eps, "seed": 0}

    def run(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        sequence = [
            torchattacks.APGD(net, steps=100, **common),
            torchattacks.APGDT(net, steps=100, n_classes=10, **common),
            torchattacks.FAB(net, steps=100, multi_targeted=True, n_classes=10, **common),
            torchattacks.Square(net, n_queries=5000, **common),
        ]
        return torchattacks.MultiAttack(sequence)(x, y)

    return {"torchattacks": run}


def carlini_wagner(steps: int, searches: int) -> dict[str, Attack]:
    """C&W in l2 with a bisection over c.

    torchattacks has no bisection. ART doubles c where we take ten times as much: in these searches it fools 9 % of the
    digits, and with a line search at every step it takes minutes; so neither gives a median to compare with.
    """
    attack = foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=searches, steps=steps)
    return {"foolbox": in_foolbox(attack, None)}


def deepfool() -> dict[str, Attack]:
    """DeepFool in l2, 50 steps, overshoot 0.02."""
    return {
        "foolbox": in_foolbox(foolbox.attacks.L2DeepFoolAttack(steps=50, candidates=10), None),
        "torchattacks": in_torchattacks(torchattacks.DeepFool, steps=50, overshoot=0.02),
        "ART": in_art(evasion.DeepFool, max_iter=50, epsilon=0.02, nb_grads=10, batch_size=1000),
    }


class _FastGradient:
    """ART's FGSM has no option ``verbose``."""

    def __init__(self, estimator: Any, *, verbose: bool, **settings: Any) -> None:
        self.attack = evasion.FastGradientMethod(estimator, batch_size=1000, **settings)

    def generate(self, x: Any, y: Any) -> Any:
        return self.attack.generate(x, y=y)
