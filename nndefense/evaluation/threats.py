"""What is attacked, how, how strongly, and what the attacker knows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nndefense import attacks
from nndefense.errors import InputError

# From the attacker who has nothing of the defence to the one who has all of it.
THREAT_MODELS = ("black", "gray", "white", "adaptive")
# Attacks that stay inside a budget, and those that look for the least change; both on anything that gives logits.
FIXED = ("fgsm", "pgd", "apgd", "apgd-t", "autoattack", "square")
LEAST = ("fab", "cw", "deepfool")
# Attacks on the retrieval itself.
RETRIEVAL = (
    "adaptive",
    "soft-retrieval",
    "straight-through",
    "push-pull",
    "ask",
    "drift",
    "pgd-pr",
    "pgd-fs",
    "square",
)
LOSSES = ("cross-entropy", "margin", "dlr")
ONE_STEP = ("fgsm",)


def attacks_for(threat_model: str) -> tuple[str, ...]:
    """The names of the attacks that a threat model can use."""
    if threat_model == "adaptive":
        return RETRIEVAL
    if threat_model == "white":
        # The relaxed defence has gradients, but no least change of its own is one of the true defence.
        return ("fgsm", "pgd", "apgd")
    return FIXED + LEAST


@dataclass(frozen=True)
class AttackSettings:
    """An attack with its budget grid.

    Attributes:
        name: one of :data:`FIXED`, :data:`LEAST` or :data:`RETRIEVAL`.
        norm: ``linf``, ``l2`` or ``normalized-l2``.
        eps: the radii to run, in units of the norm, each finite and above 0.
        steps: gradient steps per restart (queries for ``square``; FGSM has one).
        restarts: random starts; the worst one counts.
        loss: what PGD and APGD raise: ``cross-entropy``, ``margin`` or ``dlr``.
    """

    name: str = "pgd"
    norm: str = "normalized-l2"
    eps: tuple[float, ...] = (0.06,)
    steps: int = 20
    restarts: int = 1
    loss: str = "cross-entropy"

    def __post_init__(self) -> None:
        known = tuple(dict.fromkeys(FIXED + LEAST + RETRIEVAL))
        if self.name not in known:
            raise InputError(f"the attack is {self.name!r}, but must be one of {', '.join(known)}")
        if self.norm not in attacks.NORMS:
            raise InputError(f"norm is {self.norm!r}, but must be one of {', '.join(attacks.NORMS)}")
        if not self.eps or not all(math.isfinite(eps) and eps > 0 for eps in self.eps):
            raise InputError("give at least one eps, each finite and above 0 (clean accuracy is always measured)")
        if self.steps < 1 or self.restarts < 1:
            raise InputError("an attack needs at least 1 step and 1 restart")
        if self.loss not in LOSSES:
            raise InputError(f"the loss is {self.loss!r}, but must be one of {', '.join(LOSSES)}")

    def to_json(self) -> dict[str, Any]:
        """Plain values for a results file."""
        steps, restarts = (1, 1) if self.name in ONE_STEP else (self.steps, self.restarts)
        plain = {"name": self.name, "norm": self.norm, "eps": list(self.eps), "steps": steps, "restarts": restarts}
        return plain if self.loss == "cross-entropy" else {**plain, "loss": self.loss}


@dataclass(frozen=True)
class ThreatModel:
    """Who the attacker is, and what he has in his hands.

    ``black``: a surrogate that was trained apart from the classifier; ``gray``: the classifier itself, with the
    retrieval ignored (Dubey et al. 2019, section 3.1, read as papers that follow it do); ``white``: the whole defence
    with the retrieval relaxed until it has a gradient; ``adaptive``: attacks made for retrieval, on the true defence.

    Attributes:
        name: one of :data:`THREAT_MODELS`.
        target: images N x C x H x W -> logits for the first three, a retrieval surface for ``adaptive``.
        surrogate: the surrogate's own identity, for the record; None where the classifier is attacked.
        knowledge: what the attacker knows, ``L0`` to ``L3``; empty for the black box, who knows nothing.
        subject: the only defence that these attacked images are made for and shown to; None: shown to all.
    """

    name: str
    target: Any
    surrogate: str | None = None
    knowledge: str = ""
    subject: str | None = None
