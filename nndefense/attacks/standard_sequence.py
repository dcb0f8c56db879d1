"""AutoAttack: four attacks in sequence, each on what still stands (Croce and Hein, ICML 2020, section 5).

And one attack or sequence with its bill, counted in images: forward and backward passes, queries and seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nndefense.attacks import norms
from nndefense.attacks.auto_pgd import apgd
from nndefense.attacks.checks import at_least, checked_inputs
from nndefense.attacks.door import adapted, any_numbers, labels_of
from nndefense.attacks.fast_boundary import fab
from nndefense.attacks.losses import Loss, Model, checked_logits, fooled_by
from nndefense.attacks.random_squares import square
from nndefense.attacks.wrappers import Around
from nndefense.errors import InputError
from nndefense.memory import reusing_memory

#: The attacks of AutoAttack in their order (Croce and Hein 2020, the standard sequence).
ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
# A perturbation of minimum norm may lie on the sphere, where rounding decides.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class WorstCase:
    """The worst case over a sequence of attacks.

    Attributes:
        images: N x C x H x W in [0, 1]: the images that fooled the model, and the clean ones of those that stand.
        broken_by: for each image the attack that broke it, ``clean`` where it was misclassified unattacked, or the
            empty string where it stands.
    """

    images: Tensor
    broken_by: tuple[str, ...]

    @property
    def robust_accuracy(self) -> float:
        """The share of all images that nothing broke, in [0, 1]; NaN without images."""
        return self.broken_by.count("") / len(self.broken_by) if self.broken_by else float("nan")


@any_numbers
@reusing_memory
def autoattack(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    attacks: tuple[str, ...] | None = None,
    steps: int = 100,
    targets: int = 9,
    queries: int = 5000,
    generator: torch.Generator | None = None,
) -> WorstCase:
    """The standard version of AutoAttack (Croce and Hein, ICML 2020): APGD-CE, APGD-T, FAB-T and Square.

    Each attack sees only the images that stand, and every success is confirmed by a forward pass and by its distance.
    With fewer than 4 classes the targeted DLR does not exist, and APGD on the margin takes its place, as
    ``apgd-margin``.

    ``model``, ``x``, ``y``, ``eps``, ``norm``, ``generator`` and the errors are as for :func:`nndefense.attacks.pgd`.

    Args:
        attacks: which of :data:`ATTACKS` to run, in this order; all by default.
        steps: steps of APGD and FAB, at least 1.
        targets: target classes of APGD-T and FAB-T, at least 1; at most K - 1 exist.
        queries: queries of Square per image, at least 1.

    Returns:
        The images and which attack broke each.
    """
    radii = checked_inputs(model, x, y, eps, norm)
    attacks = ATTACKS if attacks is None else attacks
    if unknown := [name for name in attacks if name not in ATTACKS]:
        raise InputError(f"{unknown[0]!r} is no attack of the sequence: choose from {', '.join(ATTACKS)}")
    for name, value in (("steps", steps), ("targets", targets), ("queries", queries)):
        at_least(name, value)
    model, x = adapted(model, x), x.detach()
    logits = checked_logits(model, x, y)
    few = logits.shape[1] < 4
    ball = "linf" if norm == "linf" else "l2"

    plan: dict[str, tuple[Callable[..., Tensor], dict[str, object]]] = {
        "apgd-ce": (apgd, {"steps": steps}),
        "apgd-t": (apgd, {"steps": steps, **({"loss": "margin"} if few else {"targets": targets})}),
        "fab-t": (fab, {"steps": steps, "targets": targets, "searches": 0}),
        "square": (square, {"queries": queries}),
    }
    worst, broken = x.clone(), ["clean" if wrong else "" for wrong in fooled_by(logits, y).tolist()]
    for short in attacks:
        attack, options = plan[short]
        here = torch.tensor([row for row, by in enumerate(broken) if not by], dtype=torch.int64, device=x.device)
        if len(here) == 0:
            break
        # The radii are absolute by now, so both l2 norms are l2.
        attacked = attack(model, x[here], y[here], eps=radii[here], norm=ball, generator=generator, **options)
        with torch.no_grad():
            fooled = fooled_by(model(attacked), y[here])
        fooled &= norms.distance(x[here], attacked, ball) <= radii[here] * (1 + _ROUNDING) + _ROUNDING
        worst[here[fooled]] = attacked[fooled]
        for row in here[fooled].tolist():
            broken[row] = "apgd-margin" if few and short == "apgd-t" else short
    return WorstCase(worst, tuple(broken))


@any_numbers
def apgd_square(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 100,
    generator: torch.Generator | None = None,
) -> WorstCase:
    """APGD-CE, then APGD-T on what stands, then Square: :func:`autoattack` without FAB-T, at an effort of one's choice.

    Square asks 10 queries for each of the ``steps`` of APGD; all else is as for :func:`autoattack`.
    """
    sequence = ("apgd-ce", "apgd-t", "square")
    at_least("steps", steps)
    return autoattack(
        model, x, y, eps=eps, norm=norm, attacks=sequence, steps=steps, queries=10 * steps, generator=generator
    )


AttackFunction = Callable[..., Tensor | WorstCase]


class Counted(Around):
    """A model that counts what it is asked for; otherwise it is the same model.

    Attributes:
        forwards: images x forward passes; a pass of ``Eot`` over 20 draws counts 20 for each image.
        backwards: images x gradients with respect to them, in the same measure.
        queries: those of ``forwards`` that no gradient could follow, as a black box is asked.

    Args:
        model: images N x C x H x W in [0, 1] -> logits N x K.
    """

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model)
        self.forwards = self.backwards = self.queries = 0

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits, counted: N x C x H x W -> N x K."""
        return self.model(self._count(x))

    def _expected_loss(self, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """The model's own expected loss, counted: what :class:`nndefense.attacks.Eot` declares."""
        found: tuple[Tensor, Tensor] = self.model.expected_loss(self._count(x), y, loss)  # type: ignore[attr-defined]
        return found

    def _predictions(self, x: Tensor, progress: float | None = None) -> Tensor:
        """Single answers of a random defence, counted: what :func:`nndefense.attacks.eot_pgd` asks for."""
        found: Tensor = self.model.predictions(self._count(x), progress)  # type: ignore[attr-defined]
        return found

    def _count(self, x: Tensor) -> Tensor:
        cost = len(x) * self.passes
        self.forwards += cost
        if not (torch.is_grad_enabled() and x.requires_grad):
            self.queries += cost
            return x
        # A view, because a hook on it sees every gradient that goes through this call, and no other.
        seen = x.view_as(x)
        seen.register_hook(lambda _: self._count_gradient(cost))  # type: ignore[no-untyped-call]
        return seen

    def _count_gradient(self, cost: int) -> None:
        self.backwards += cost


@dataclass(frozen=True)
class Result:
    """What an attack found and what it cost.

    Attributes:
        images: attacked images N x C x H x W in [0, 1].
        success: N booleans: the judge gives another class than the label, or the target class.
        forwards: images x forward passes in all, ``Eot`` draws counted singly.
        backwards: images x gradients in all.
        queries: those of ``forwards`` that were asked without a gradient.
        seconds: wall time of the attack, without the judgement.
        broken_by: for a sequence of attacks the one that broke each image; else None.
    """

    images: Tensor
    success: Tensor
    forwards: int
    backwards: int
    queries: int
    seconds: float
    broken_by: tuple[str, ...] | None = None

    @property
    def success_rate(self) -> float:
        """Share of all images on which the attack succeeded, in [0, 1]; NaN without images."""
        return float(self.success.double().mean())


def run(
    attack: AttackFunction, model: Model, x: Tensor, y: Tensor, *, judge: Model | None = None, **settings: Any
) -> Result:
    """Run an attack, count its cost, and judge the images that it made.

    Args:
        attack: a function (model, x, y, ...) -> images, as all in this package are.
        model: what the attack sees: images N x C x H x W in [0, 1] -> logits N x K.
        x: clean images, N x C x H x W in [0, 1].
        y: labels N, or target classes where ``settings`` holds ``targeted=True``.
        judge: the model that decides on success; by default ``model``. With another one this is a transfer attack
            from ``model`` as surrogate.
        settings: the attack's own keyword arguments.

    Returns:
        Images, successes and cost. The forward pass of the judgement is not counted.

    Raises:
        InputError: whatever the attack refuses.
    """
    counted = Counted(model)
    wait(x)
    begun = time.perf_counter()
    found = attack(counted, x, y, **settings)
    wait(x)
    seconds = time.perf_counter() - begun
    images, broken_by = (found.images, found.broken_by) if isinstance(found, WorstCase) else (found, None)
    judge = adapted(judge or model, x)
    with torch.no_grad():
        success = fooled_by(judge(images), labels_of(y), bool(settings.get("targeted", False)))
    return Result(images, success, counted.forwards, counted.backwards, counted.queries, seconds, broken_by)


def wait(x: Tensor) -> None:
    """Wait for the device of ``x``, so that seconds are those of finished work."""
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
