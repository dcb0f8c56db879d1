"""FAB-T: the targeted fast adaptive boundary attack of minimum norm (Croce and Hein, ICML 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from nndefense.attacks import norms
from nndefense.attacks.checks import at_least, checked_inputs, fraction
from nndefense.attacks.door import any_type
from nndefense.attacks.losses import Model, checked_logits, fooled_by, likeliest_others, loss_and_gradient
from nndefense.errors import InputError
from nndefense.memory import reusing_memory


@any_type
@reusing_memory
def fab(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "linf",
    eps: float | Tensor | None = None,
    steps: int = 100,
    targets: int = 9,
    restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    searches: int = 10,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Targeted fast adaptive boundary attack, FAB-T (Croce and Hein, "Minimally distorted adversarial examples", 2020).

    For each of the likeliest wrong classes t in turn, the decision between y and t is linearised at the present point,
    point and clean image are both projected on that hyperplane inside the box [0, 1], and the next point lies between
    them, overshooting by ``eta``; from a point that fools the model the run goes a tenth of the way back. Each
    image keeps the nearest point that fools the model, and a bisection between it and the clean image ends the search.

    ``model``, ``x``, ``y``, ``generator`` and the errors are as for :func:`nndefense.attacks.pgd`.

    Args:
        norm: the norm that is made small: ``linf``, ``l2``, or ``normalized-l2``, which has the same minimum as l2.
        eps: stop for an image whose perturbation is within this radius (one number or one per image, in units of
            ``norm``), as AutoAttack does between target classes; None looks for the minimum with every class.
        steps: iterations per target class, at least 1: two forward passes and one gradient each.
        targets: number of target classes, at least 1; at most K - 1 exist.
        restarts: runs per target class; the first starts at ``x``, later ones at random within half of the distance
            found so far (within half of ``eps`` where nothing was found), and need ``eps`` or a success for that.
        alpha_max: largest pull towards the clean image, in (0, 1].
        eta: overshoot, at least 1.
        beta: how much of a perturbation that fools the model is kept for the next step, in (0, 1].
        searches: bisections at the end, at least 0, one forward pass each. Without them the overshoot leaves half a
            per cent, even on a linear model; AutoAttack makes none.

    Returns:
        The nearest images found that fool the model, whatever their distance: same shape, dtype and device as ``x``,
        in [0, 1]. The clean image where none was found, or where it is already misclassified.
    """
    radii = checked_inputs(model, x, y, eps, norm)
    at_least("steps", steps)
    at_least("targets", targets)
    at_least("restarts", restarts)
    at_least("searches", searches, 0)
    fraction("alpha_max", alpha_max)
    fraction("beta", beta)
    if not eta >= 1:
        raise InputError(f"eta is {eta}, but must be at least 1")
    x = x.detach()
    logits = checked_logits(model, x, y)
    rivals = likeliest_others(logits, y, targets)
    best, shortest = x.clone(), torch.full_like(radii, torch.inf)
    shortest[fooled_by(logits, y)] = 0.0
    for column in range(rivals.shape[1]):
        for restart in range(restarts):
            # Without eps the radii are infinite, and every correctly classified image goes on.
            here = ((shortest > 0) & ((shortest > radii) | (eps is None))).nonzero()[:, 0]
            if len(here) == 0:
                break
            start = x[here]
            if restart:
                reach = torch.minimum(shortest[here], radii[here])
                reach = torch.where(reach.isfinite(), reach, torch.zeros_like(reach)) / 2
                start = (start + norms.random_on_sphere(start, reach, norm, generator)).clamp_(0, 1)
            pair = torch.stack([y[here], rivals[here, column]], dim=1)
            found, size = _descend(model, x[here], pair, start, norm, steps, alpha_max, eta, beta)
            nearer = size < shortest[here]
            best[here[nearer]], shortest[here[nearer]] = found[nearer], size[nearer]
    here = (shortest.isfinite() & (shortest > 0)).nonzero()[:, 0]
    best[here] = _bisect(model, x[here], y[here], best[here], searches)
    return best


def to_hyperplane(x: Tensor, w: Tensor, c: Tensor, norm: str) -> Tensor:
    """The smallest step from ``x`` to the hyperplane ``w . z = c`` that stays in the box [0, 1], exactly.

    In both norms the step is ``sign * min(t * speed, room)`` per pixel with one level t per image, and t solves a
    piecewise linear equation, so one sort of the breakpoints is enough (Hein and Andriushchenko 2017, section 4).

    Args:
        x: points N x C x H x W in [0, 1].
        w: normals, the same shape.
        c: offsets N.
        norm: ``linf``, or else l2.

    Returns:
        Steps N x C x H x W. Where the box does not reach the hyperplane, the step to the corner nearest to it.
    """
    normal, point = w.flatten(1), x.flatten(1)
    missing = c - (normal * point).sum(1)
    # From here on the task is to raise normal . z by a positive amount.
    normal = normal * torch.where(missing < 0, -1.0, 1.0).to(normal)[:, None]
    room = torch.where(normal > 0, 1 - point, point)
    size = normal.abs()
    speed = torch.ones_like(size) if norm == "linf" else size
    stop = torch.where(size > 0, room / speed.clamp_min(torch.finfo(size.dtype).tiny), torch.zeros_like(size))
    level = _level(size * speed, stop, missing.abs())
    # A pixel without weight does not help, so it stays where it is.
    step = torch.minimum(level[:, None] * speed, room) * normal.sign()
    return step.view_as(x)


def _level(weights: Tensor, stops: Tensor, amount: Tensor) -> Tensor:
    """The least t with ``sum_i weights_i * min(t, stops_i) = amount``, N; the last stop where there is none."""
    stops, order = stops.sort(dim=1)
    weights = weights.gather(1, order)
    # At the k-th stop everything before it has stopped, and the rest runs at full weight.
    running = weights.flip(1).cumsum(1).flip(1)
    stopped = (weights * stops).cumsum(1)
    reached = stopped + stops * (running - weights)
    k = (reached < amount[:, None]).sum(1, keepdim=True)
    last = k == stops.shape[1]
    k = k.clamp_max(stops.shape[1] - 1)
    before = stopped.gather(1, k) - weights.gather(1, k) * stops.gather(1, k)
    level = (amount[:, None] - before) / running.gather(1, k).clamp_min(torch.finfo(stops.dtype).tiny)
    return torch.where(last, stops[:, -1:], torch.minimum(level, stops.gather(1, k)))[:, 0]


def _gap(logits: Tensor, pair: Tensor) -> Tensor:
    """``z_t - z_y``, negative until the target class overtakes the label: N x K and N x 2 -> N."""
    chosen = logits.gather(1, pair)
    return chosen[:, 1] - chosen[:, 0]


@torch.no_grad()
def _bisect(model: Model, x: Tensor, y: Tensor, found: Tensor, searches: int) -> Tensor:
    """Points nearer to x on the way to ``found`` that still fool the model: N x C x H x W -> N x C x H x W."""
    low, high = torch.zeros_like(x[:, :1, :1, :1]), torch.ones_like(x[:, :1, :1, :1])
    for _ in range(searches if len(x) else 0):
        middle = (low + high) / 2
        tried = x + middle * (found - x)
        fooled = norms.per_image(fooled_by(model(tried), y), x)
        low, high = torch.where(fooled, low, middle), torch.where(fooled, middle, high)
    return torch.where(high < 1, x + high * (found - x), found)


def _descend(
    model: Model,
    x: Tensor,
    pair: Tensor,
    start: Tensor,
    norm: str,
    steps: int,
    alpha_max: float,
    eta: float,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """One run (the paper's Algorithm 1): nearest fooling images N x C x H x W and their distances N, inf where none."""
    found, shortest = x.clone(), torch.full_like(x.flatten(1)[:, 0], torch.inf)
    now = start
    for _ in range(steps):
        gap, _, normal = loss_and_gradient(model, now, pair, _gap)
        offset = (normal * now).flatten(1).sum(1) - gap
        to_plane, clean_to_plane = to_hyperplane(now, normal, offset, norm), to_hyperplane(x, normal, offset, norm)
        near, far = (norms.distance(step, torch.zeros_like(step), norm) for step in (to_plane, clean_to_plane))
        near, far = near.clamp_min(1e-8), far.clamp_min(1e-8)
        alpha = norms.per_image((near / (near + far)).clamp_max(alpha_max), x)
        now = ((1 - alpha) * (now + eta * to_plane) + alpha * (x + eta * clean_to_plane)).clamp_(0, 1)
        with torch.no_grad():
            fooled = fooled_by(model(now), pair[:, 0])
        size = norms.distance(x, now, norm)
        nearer = norms.per_image(fooled & (size < shortest), x)
        found = torch.where(nearer, now, found)
        shortest = torch.where(fooled, torch.minimum(size, shortest), shortest)
        now = torch.where(norms.per_image(fooled, x), x + beta * (now - x), now)
    return found, shortest
