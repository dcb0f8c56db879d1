"""What is attacked, how, and how strongly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nndefense import attacks
from nndefense.errors import InputError
from nndefense.models import Classifier

THREAT_MODELS = ("gray", "black")


@dataclass(frozen=True)
class AttackSettings:
    """An attack with its budget grid.

    Attributes:
        name: ``pgd`` or ``fgsm``.
        norm: ``linf``, ``l2`` or ``normalized-l2``.
        eps: the radii to run, in units of the norm, each finite and above 0.
        steps: gradient steps of PGD per restart (FGSM has one).
        restarts: random starts of PGD; the worst one counts.
    """

    name: str = "pgd"
    norm: str = "normalized-l2"
    eps: tuple[float, ...] = (0.06,)
    steps: int = 20
    restarts: int = 1

    def __post_init__(self) -> None:
        if self.name not in ("pgd", "fgsm"):
            raise InputError(f"the attack is {self.name!r}, but must be pgd or fgsm")
        if self.norm not in attacks.NORMS:
            raise InputError(f"norm is {self.norm!r}, but must be one of {', '.join(attacks.NORMS)}")
        if not self.eps or not all(math.isfinite(eps) and eps > 0 for eps in self.eps):
            raise InputError("give at least one eps, each finite and above 0 (clean accuracy is always measured)")
        if self.steps < 1 or self.restarts < 1:
            raise InputError("an attack needs at least 1 step and 1 restart")

    def run(self, model: Classifier, images: Tensor, labels: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """Attack a batch of images N x C x H x W at one radius."""
        if self.name == "fgsm":
            return attacks.fgsm(model, images, labels, eps=eps, norm=self.norm)
        return attacks.pgd(
            model,
            images,
            labels,
            eps=eps,
            norm=self.norm,
            steps=self.steps,
            restarts=self.restarts,
            generator=generator,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values for a results file."""
        steps, restarts = (1, 1) if self.name == "fgsm" else (self.steps, self.restarts)
        return {"name": self.name, "norm": self.norm, "eps": list(self.eps), "steps": steps, "restarts": restarts}


@dataclass(frozen=True)
class ThreatModel:
    """Who the attacker is: which network's gradients are followed.

    ``gray``: the classifier itself, with the retrieval ignored; ``black``: a surrogate that was trained apart from
    it (Dubey et al. 2019, section 3.1, read as papers that follow it do).
    """

    name: str
    target: Classifier
    # The surrogate's own identity, for the record; None where the classifier is attacked.
    surrogate: str | None = field(default=None)
