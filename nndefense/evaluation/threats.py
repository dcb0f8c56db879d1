"""What is attacked, how, how strongly, and what the attacker knows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from nndefense.attacks import registry
from nndefense.attacks.registry import NORMS, Attack
from nndefense.errors import InputError, check_choice

LOSSES = ("cross-entropy", "margin", "dlr")


@dataclass(frozen=True)
class AttackSettings:
    """An attack with its budget grid.

    Attributes:
        name: of an attack in :mod:`nndefense.attacks.registry`, or ``python:FILE:FUNCTION`` for the user's own.
        norm: ``linf``, ``l2`` or ``normalized-l2``.
        eps: the radii to run, in units of the norm, each finite and above 0.
        steps: gradient steps per restart, of an attack that counts steps; by default its standard number.
        restarts: random starts; the worst one counts.
        loss: what PGD and APGD raise: ``cross-entropy``, ``margin`` or ``dlr``.
        queries: answers asked per image, of an attack that counts them; by default its standard number.
    """

    name: str = "pgd"
    norm: str = "normalized-l2"
    eps: tuple[float, ...] = (0.06,)
    steps: int | None = None
    restarts: int = 1
    loss: str = "cross-entropy"
    queries: int | None = None

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, NORMS)
        if not self.eps or not all(math.isfinite(eps) and eps > 0 for eps in self.eps):
            raise InputError("give at least one eps, each finite and above 0 (clean accuracy is always measured)")
        if min(self.steps or 1, self.queries or 1, self.restarts) < 1 or 0 in (self.steps, self.queries):
            raise InputError("an attack needs at least 1 step or query and 1 restart")
        check_choice("the loss", self.loss, LOSSES)
        self.attack.check(self.norm, self.steps, self.queries, self.restarts, self.loss)
        unit = self.attack.effort or "steps"
        if getattr(self, unit) is None and self.attack.standard:
            object.__setattr__(self, unit, self.attack.standard)

    @cached_property
    def attack(self) -> Attack:
        """What the registry had under the name when the settings were made."""
        return registry.get(self.name)

    @property
    def effort(self) -> int:
        """Steps or queries, whichever the attack counts; 0 where it counts nothing."""
        return (self.queries if self.attack.effort == "queries" else self.steps) or 0

    def times(self, factor: int, least: int = 0) -> AttackSettings:
        """The same with so many times the effort, and at least ``least`` steps; as it is where that is fixed."""
        if self.attack.effort == "queries":
            return replace(self, queries=factor * self.effort)
        return replace(self, steps=max(factor * self.effort, least)) if self.attack.effort else self

    def to_json(self) -> dict[str, Any]:
        """Plain values for a results file."""
        unit = self.attack.effort or "steps"
        plain = {"name": self.name, "norm": self.norm, "eps": list(self.eps), unit: self.effort}
        plain["restarts"] = self.restarts
        plain |= {} if self.loss == "cross-entropy" else {"loss": self.loss}
        return plain | ({"sha256": self.attack.sha256} if self.attack.sha256 else {})


@dataclass(frozen=True)
class ThreatModel:
    """Who the attacker is, and what he has in his hands.

    ``black``: a surrogate that was trained apart from the classifier; ``gray``: the classifier itself, with the
    retrieval ignored (Dubey et al. 2019, section 3.1, read as papers that follow it do); ``white``: the whole defence
    with the retrieval relaxed until it has a gradient; ``adaptive``: attacks made for retrieval, on the true defence.

    Attributes:
        name: one of :data:`nndefense.attacks.registry.THREAT_MODELS`.
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
