"""AutoAttack: four attacks in sequence, each on what still stands (Croce and Hein, ICML 2020, section 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nndefense.attacks import norms
from nndefense.attacks.auto_pgd import apgd
from nndefense.attacks.checks import at_least, checked_inputs
from nndefense.attacks.fast_boundary import fab
from nndefense.attacks.objective import Model, checked_logits, fooled_by
from nndefense.attacks.random_squares import square
from nndefense.errors import InputError
from nndefense.memory import reusing_memory

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
    x = x.detach()
    logits = checked_logits(model, x, y)
    few = logits.shape[1] < 4
    ball = "linf" if norm == "linf" else "l2"

    def shared(more: dict[str, object]) -> dict[str, object]:
        return {"norm": ball, "generator": generator} | more

    settings: dict[str, tuple[str, Callable[..., Tensor], dict[str, object]]] = {
        "apgd-ce": ("apgd-ce", apgd, shared({"steps": steps})),
        "apgd-t": ("apgd-t", apgd, shared({"steps": steps, "targets": targets})),
        "fab-t": ("fab-t", fab, shared({"steps": steps, "targets": targets, "searches": 0})),
        "square": ("square", square, shared({"queries": queries})),
    }
    if few:
        settings["apgd-t"] = ("apgd-margin", apgd, shared({"steps": steps, "loss": "margin"}))

    worst, broken = x.clone(), ["clean" if wrong else "" for wrong in fooled_by(logits, y).tolist()]
    for short in attacks:
        name, attack, options = settings[short]
        here = torch.tensor([row for row, by in enumerate(broken) if not by], dtype=torch.int64, device=x.device)
        if len(here) == 0:
            break
        # The radii are absolute by now, so both l2 norms are l2.
        attacked = attack(model, x[here], y[here], eps=radii[here], **options)
        with torch.no_grad():
            fooled = fooled_by(model(attacked), y[here])
        fooled &= norms.distance(x[here], attacked, ball) <= radii[here] * (1 + _ROUNDING) + _ROUNDING
        worst[here[fooled]] = attacked[fooled]
        for row in here[fooled].tolist():
            broken[row] = name
    return WorstCase(worst, tuple(broken))
