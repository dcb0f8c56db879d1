"""APGD: projected gradient descent that sets its own step size (Croce and Hein, ICML 2020, section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nndefense.attacks import losses, norms
from nndefense.attacks.checks import at_least, checked_inputs, fraction
from nndefense.attacks.door import any_type
from nndefense.attacks.losses import Loss, Model, fooled_by, loss_and_gradient
from nndefense.errors import InputError
from nndefense.memory import reusing_memory

# Algorithm 1 and section 3.2 of the paper.
_FIRST_STEP, _MOMENTUM = 2.0, 0.75
_FIRST_CHECK, _CHECK_SHRINK, _SHORTEST_CHECK = 0.22, 0.03, 0.06


@any_type
@reusing_memory
def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 100,
    loss: str | Loss = "cross-entropy",
    targets: int | None = None,
    targeted: bool = False,
    restarts: int = 1,
    rho: float = 0.75,
    exact_projection: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Auto-PGD (Croce and Hein, ICML 2020, Algorithm 1); with ``targets`` APGD-T on the targeted DLR.

    The step begins at ``2 * eps`` and is halved at checkpoints where too few steps raised the loss, or where neither
    the step nor the best loss has changed since the checkpoint before; the run then goes on from its best point. A
    step moves by ``0.75 * (z - x_k) + 0.25 * (x_k - x_{k-1})``, z being the projected gradient step. Images leave the
    batch as soon as they fool the model, and only those that stand meet the next restart or target class.

    ``model``, ``x``, ``y``, ``eps``, ``norm``, ``targeted``, ``exact_projection``, ``generator`` and the errors are as
    for :func:`nndefense.attacks.pgd`.

    Args:
        steps: gradient steps per run, at least 1; a run makes one forward pass and gradient more than that.
        loss: a name in :data:`nndefense.attacks.LOSSES` except ``kl``, or a callable; unused with ``targets``.
        targets: attack this many classes in turn, the likeliest wrong ones of the clean image first (9 in the paper;
            at most K - 1 exist). K must be at least 4. Not with ``targeted``, whose ``y`` is the one class to reach.
        restarts: independent runs (for each target), at least 1.
        rho: share of steps between checkpoints that must raise the loss, in (0, 1].

    Returns:
        The attacked images: same shape, dtype and device as ``x``, in [0, 1] and inside the ball. Where nothing fools
        the model, the point of highest loss.
    """
    radii = checked_inputs(model, x, y, eps, norm)
    at_least("steps", steps)
    at_least("restarts", restarts)
    fraction("rho", rho)
    x = x.detach()
    rivals: Tensor | None = None
    objective = losses.find_loss(loss)
    if targets is not None:
        if targeted:
            raise InputError("targets are classes that apgd finds for itself: give it a target, or leave targeted out")
        at_least("targets", targets)
        rivals, objective = losses.likeliest_others(losses.checked_logits(model, x, y), y, targets), _towards
    elif objective is losses.kl:
        raise InputError("the KL divergence does not know the label: use pgd with it, or another loss")

    objective = losses.negated(objective) if targeted else objective
    best, best_loss, standing = x.clone(), torch.full_like(radii, -torch.inf), torch.arange(len(x), device=x.device)
    first = objective if rivals is not None else losses.checking(objective)
    for column in range(1 if rivals is None else rivals.shape[1]):
        for _ in range(restarts):
            if len(standing) == 0:
                return best
            goal = y if rivals is None else torch.stack([y, rivals[:, column]], dim=1)
            run = _Run(objective, first, targeted, norm, steps, rho, exact_projection, generator)
            attacked, reached, fooled = run.ascend(model, x[standing], y[standing], goal[standing], radii[standing])
            better = fooled | (reached > best_loss[standing])
            kept = standing[better]
            best[kept], best_loss[kept] = attacked[better], reached[better]
            standing, first = standing[~fooled], objective
    return best


def checkpoints(steps: int) -> Iterator[int]:
    """The numbers of steps after which APGD reviews its step size; for 100 steps 22, 41, 57, 70, 80, 87, 93, 99."""
    gap, shrink, least = (max(int(part * steps), 1) for part in (_FIRST_CHECK, _CHECK_SHRINK, _SHORTEST_CHECK))
    at = gap
    while at <= steps:
        yield at
        gap = max(gap - shrink, least)
        at += gap


def _towards(logits: Tensor, pair: Tensor) -> Tensor:
    """The targeted DLR with label and target side by side: N x K and N x 2 -> N."""
    return losses.targeted_dlr(logits, pair[:, 0], pair[:, 1])


@dataclass
class _State:
    """What a run knows of each image that it still attacks; the first axis of every tensor is the image."""

    row: Tensor
    x: Tensor
    y: Tensor
    goal: Tensor
    radii: Tensor
    step: Tensor
    now: Tensor
    before: Tensor
    value: Tensor
    gradient: Tensor
    best: Tensor
    best_value: Tensor
    best_gradient: Tensor
    rises: Tensor
    value_at_check: Tensor
    halved_at_check: Tensor

    def keep(self, chosen: Tensor) -> None:
        """Go on with some of the images."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[chosen])


@dataclass(frozen=True)
class _Run:
    """One run of APGD on a batch."""

    loss: Loss
    first: Loss
    targeted: bool
    norm: str
    steps: int
    rho: float
    exact: bool
    generator: torch.Generator | None

    def ascend(self, model: Model, x: Tensor, y: Tensor, goal: Tensor, radii: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attacked images N x C x H x W, their loss N, and whether they fool the model N."""
        inside = norms.projector(x, radii, self.norm, exact=self.exact)
        start = inside(x + norms.random_on_sphere(x, radii, self.norm, self.generator))
        value, logits, gradient = loss_and_gradient(model, start, goal, self.first)
        found, loss, fooled = start.clone(), value.clone(), fooled_by(logits, y, self.targeted)
        row, unset = torch.arange(len(x), device=x.device), torch.zeros_like(value)
        s = _State(
            row, x, y, goal, radii, _FIRST_STEP * radii, start, start, value, gradient, start, value, gradient,
            unset, value, unset.bool(),
        )  # fmt: skip
        if bool(fooled.any()):
            s.keep(~fooled)
            inside = norms.projector(s.x, s.radii, self.norm, exact=self.exact)
        reviews, reviewed = set(checkpoints(self.steps)), 0
        for step in range(1, self.steps + 1):
            if len(s.row) == 0:
                break
            # The gradient step with momentum.
            share = 1.0 if step == 1 else _MOMENTUM
            aim = inside(torch.addcmul(s.now, norms.per_image(s.step, s.x), norms.steepest(s.gradient, self.norm)))
            s.before, s.now = s.now, inside(s.now + share * (aim - s.now) + (1 - share) * (s.now - s.before))
            value, logits, s.gradient = loss_and_gradient(model, s.now, s.goal, self.loss)
            s.rises = s.rises + (value > s.value)
            s.value = value
            better = s.value > s.best_value
            wide = norms.per_image(better, s.x)
            s.best, s.best_gradient = torch.where(wide, s.now, s.best), torch.where(wide, s.gradient, s.best_gradient)
            s.best_value = torch.where(better, s.value, s.best_value)
            out = fooled_by(logits, s.y, self.targeted)
            if bool(out.any()):
                gone = s.row[out]
                found[gone], loss[gone], fooled[gone] = s.now[out], value[out], True
                s.keep(~out)
                inside = norms.projector(s.x, s.radii, self.norm, exact=self.exact)
            if step in reviews:
                self._review(s, step - reviewed)
                reviewed = step
        found[s.row], loss[s.row] = s.best, s.best_value
        return found, loss, fooled

    def _review(self, s: _State, taken: int) -> None:
        """Conditions 1 and 2 of section 3.2: halve the step and go back to the best point where either holds."""
        stalled = ~s.halved_at_check & (s.best_value <= s.value_at_check)
        halve = (s.rises < self.rho * taken) | stalled
        wide = norms.per_image(halve, s.x)
        s.step = torch.where(halve, s.step / 2, s.step)
        s.now = torch.where(wide, s.best, s.now)
        s.gradient = torch.where(wide, s.best_gradient, s.gradient)
        s.rises = torch.zeros_like(s.rises)
        s.value_at_check, s.halved_at_check = s.best_value, halve
