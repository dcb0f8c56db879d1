"""What is attacked, how strongly, and what the attacker knows; and running an attack, and what it cost."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nndefense import attacks
from nndefense.attacks import norms, registry
from nndefense.attacks.registry import NORMS, Attack
from nndefense.attacks.retrieval import RetrievalSurface
from nndefense.errors import InputError, check_choice, make_plain, plain

LOSSES = ("cross-entropy", "margin", "dlr")


@dataclass(frozen=True)
class AttackSettings:
    """An attack with its budget grid.

    Attributes:
        name: of an attack in :mod:`nndefense.attacks.registry`, or ``python:FILE:FUNCTION`` for the user's own.
        norm: ``linf``, ``l2`` or ``normalized-l2``.
        eps: the radii to run, in units of the norm, each finite and above 0, and in linf at most 1; one number is one
            radius.
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
        make_plain(self)
        several = (float(self.eps),) if isinstance(self.eps, int | float) else tuple(plain(eps) for eps in self.eps)
        object.__setattr__(self, "eps", several)
        check_choice("norm", self.norm, NORMS)
        if not self.eps or not all(math.isfinite(eps) and eps > 0 for eps in self.eps):
            raise InputError("give at least one eps, each finite and above 0 (clean accuracy is always measured)")
        norms.check_eps(max(self.eps), self.norm)
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
        """The same with ``factor`` times the effort, and at least ``least`` steps; as it is where that is fixed."""
        if self.attack.effort == "queries":
            return replace(self, queries=factor * self.effort)
        return replace(self, steps=max(factor * self.effort, least)) if self.attack.effort else self

    def to_json(self) -> dict[str, Any]:
        """Plain values for a results file."""
        unit = self.attack.effort or "steps"
        plain = {"name": self.name, "norm": self.norm, "eps": list(self.eps), unit: self.effort}
        plain["restarts"] = self.restarts
        plain |= {} if self.loss == "cross-entropy" else {"loss": self.loss}
        plain |= {"version": self.attack.version} if self.attack.version > 1 else {}
        return plain | ({"sha256": self.attack.sha256} if self.attack.sha256 else {})


@dataclass(frozen=True)
class ThreatModel:
    """Who the attacker is, and what he has in his hands.

    ``black``: a surrogate that was trained apart from the classifier; ``gray``: the classifier itself, with the
    retrieval ignored (Dubey et al. 2019, section 3.1, read as papers that follow it do); ``white``: the whole defence
    with the retrieval relaxed until it has a gradient; ``adaptive``: attacks made for retrieval, on the true defence;
    ``exact``: all that any attack can do, where that can be proven.

    Attributes:
        name: one of :data:`nndefense.attacks.registry.THREAT_MODELS`.
        target: images N x C x H x W -> logits for the first three, a retrieval surface for the others.
        surrogate: the surrogate's own identity, for the record; None where the classifier is attacked.
        knowledge: what the attacker knows, ``L0`` to ``L3``; empty for the black box, who knows nothing.
        subject: the only defence that these attacked images are made for and shown to; None: shown to all.
        also: names of attacks that are run beside those that are asked for; see :func:`attacks_by`.
    """

    name: str
    target: Any
    surrogate: str | None = None
    knowledge: str = ""
    subject: str | None = None
    also: tuple[str, ...] = ()


# One settings for all threat models, or several for each of them.
Plan = AttackSettings | Mapping[str, Sequence[AttackSettings]]


def attacks_by(threat: ThreatModel, plan: Plan) -> list[AttackSettings]:
    """The attacks of a threat model: those of the plan, and its own at each of their norms and radii.

    Its own take five times the steps that the plan asks for, up to their standard, and never fewer than the plan: 100
    where it asks for 20 of PGD.
    """
    asked = [plan] if isinstance(plan, AttackSettings) else list(plan[threat.name])
    radii: dict[str, dict[float, None]] = {}
    for settings in asked:
        radii.setdefault(settings.norm, {}).update(dict.fromkeys(settings.eps))
    names = [name for name in threat.also if name not in {settings.name for settings in asked}]
    most = max((settings.effort for settings in asked if settings.attack.effort == "steps"), default=0)
    found = [AttackSettings(name, norm, tuple(eps)) for name in names for norm, eps in radii.items()]
    return asked + [replace(own, steps=max(min(5 * most, own.effort), most)) if most else own for own in found]


# How far an attack that is not the library's may pass its budget or the box, for rounding.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Attacked:
    """What an attack made of a batch, and its cost in images x passes.

    Attributes:
        images: N x C x H x W, each within its budget and in [0, 1].
        forwards, backwards: passes through what was attacked.
        queries: answers asked of the true defence.
        certified: N: no image within the budget is misclassified; None where nothing is proven.
    """

    images: Tensor
    forwards: int = 0
    backwards: int = 0
    queries: int = 0
    certified: Tensor | None = None


def run_attack(
    settings: AttackSettings,
    target: Any,
    images: Tensor,
    labels: Tensor,
    eps: float,
    generator: torch.Generator,
    *,
    targeted: bool = False,
) -> Attacked:
    """Attack a batch at one radius.

    Args:
        settings: which attack, and how strongly; its own radii are not looked at.
        target: images N x C x H x W -> logits N x K, or a :class:`RetrievalSurface`.
        images: clean images, N x C x H x W in [0, 1].
        labels: class numbers N of the target; with ``targeted`` those that the images are to be taken for.
        eps: the radius, in units of the settings' norm.
        generator: source of random starts.

    Raises:
        InputError: an attack that does not fit the target or the norm, or cannot be sent towards a class.
    """
    attack, surface = settings.attack, isinstance(target, RetrievalSurface)
    if attack.on_retrieval and not surface:
        raise InputError(f"the attack {attack.name!r} is one on retrieval, not on a classifier")
    if surface and "gradient" in attack.needs:
        raise InputError(f"the attack {attack.name!r} needs a gradient of the defence: choose one on retrieval")
    if targeted:
        attack.check_targeted()
    if attack.on_retrieval:
        target.counts.reset()
        seen, counts = target, target.counts
    else:
        seen = counts = attacks.Counted(target.predict if surface else target)
    own = attack.name not in registry.SHIPPED
    found = attack.run(
        seen,
        # A user's attack may work in place, and what it made is measured against the clean images.
        images.clone() if own else images,
        labels.clone() if own else labels,
        effort=settings.effort,
        restarts=settings.restarts,
        loss=settings.loss,
        eps=eps,
        norm=settings.norm,
        generator=generator,
        **({"targeted": True} if targeted else {}),
    )
    # A sequence of attacks says more than the images, and a proof what no attack can break.
    made: Tensor = getattr(found, "images", found)
    if own:
        made = _checked(made, images, eps, settings)
    if attack.least:
        size = attacks.distance(images, made, settings.norm)
        inside = size <= attacks.radius(images, eps, settings.norm)
        # The clean image where the least change found is larger than the budget.
        made = torch.where(inside[:, None, None, None], made, images)
    # Every pass through the true defence is a query.
    forwards = 0 if surface and not attack.on_retrieval else counts.forwards
    return Attacked(made, forwards, counts.backwards, counts.queries, getattr(found, "certified", None))


def _checked(made: Any, x: Tensor, eps: float, settings: AttackSettings) -> Tensor:
    """What an attack of the user's made, which must be images inside ball and box but for rounding."""
    name, least = settings.name, settings.attack.least
    if not len(x):
        return x
    if not isinstance(made, Tensor) or made.shape != x.shape or not made.is_floating_point():
        given = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
        raise InputError(f"the attack {name} returned {given}, but must return images like {tuple(x.shape)}")
    images: Tensor = made.detach().to(x)
    if wrong := int((~images.isfinite()).flatten(1).any(1).sum()):
        raise InputError(f"the attack {name} returned NaN or infinite pixels in {wrong} of {len(x)} images")
    beyond = (images - 0.5).abs().flatten(1).amax(1) - 0.5
    if (excess := float(beyond.max())) > _ROUNDING:
        raise InputError(f"the attack {name} left [0, 1] by {excess:.2g}: clamp its images")
    passed = attacks.distance(x, images, settings.norm) - attacks.radius(x, eps, settings.norm)
    if not least and (excess := float(passed.max())) > _ROUNDING:
        raise InputError(
            f"the attack {name} passes its budget, {settings.norm} {eps:g}, by {excess:.2g} (raw pixels) on "
            f"{int((passed > _ROUNDING).sum())} of {len(x)} images: project them on the ball"
        )
    return images.clamp(0, 1)


def peak_memory_mb() -> float:
    """The most memory that this process has held so far, in MB; on a GPU the most that torch has held there.

    0 where the system does not tell.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
