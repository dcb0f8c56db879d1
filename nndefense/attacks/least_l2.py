"""The least change in l2: Carlini and Wagner (S&P 2017), and DeepFool (Moosavi-Dezfooli et al., CVPR 2016)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nndefense.attacks import losses, norms
from nndefense.attacks.checks import at_least, checked_inputs
from nndefense.attacks.door import any_type
from nndefense.attacks.losses import Model, checked_logits, fooled_by, gradient_to, likeliest_others, loss_and_gradient
from nndefense.errors import InputError
from nndefense.memory import reusing_memory

# Keeps the inverse of tanh finite on black and white pixels.
_INSIDE = 1 - 1e-6
_LARGEST_C = 1e10
# Adam's usual decay rates and floor (Kingma and Ba, ICLR 2015).
_FIRST, _SECOND, _FLOOR = 0.9, 0.999, 1e-8
_LOOKS = 10
_TINY = 1e-12
# Added to the length of every step, as in the authors' code: where the box eats a part of each step, the rest would
# creep up to the boundary and never cross it.
_LONGER = 1e-4


@any_type
@reusing_memory
def carlini_wagner(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 1000,
    searches: int = 9,
    initial_c: float = 1e-3,
    step_size: float = 0.01,
    confidence: float = 0.0,
    targeted: bool = False,
    abort_early: bool = True,
) -> Tensor:
    """Carlini and Wagner's l2 attack of minimum norm (S&P 2017, section 6.A), with f_6 as its objective.

    With ``x' = (tanh(w) + 1) / 2`` Adam minimises ``||x' - x||_2^2 + c * max(z_y - max_{j != y} z_j + confidence, 0)``
    over w, and c is found per image by bisection, times 10 until a first success.

    ``model``, ``x``, ``y`` and the errors are as for :func:`nndefense.attacks.pgd`.

    Args:
        steps: Adam steps for each c, at least 1: one forward pass and one gradient each.
        searches: values of c, at least 1.
        initial_c: the first c, above 0.
        step_size: Adam's learning rate, in units of w, above 0.
        confidence: margin in logits that counts as a success (kappa), at least 0.
        targeted: look for class ``y`` instead of any other.
        abort_early: end a search for an image whose loss has not fallen by 1e-4 of itself in a tenth of the steps.

    Returns:
        The nearest images found that fool the model: same shape, dtype and device as ``x``, in [0, 1]. The clean image
        where none was found, or where it already reaches the goal.
    """
    checked_inputs(model, x, y)
    at_least("steps", steps)
    at_least("searches", searches)
    if not (initial_c > 0 and step_size > 0 and confidence >= 0):
        raise InputError("initial_c and step_size must be above 0, and confidence at least 0")
    x = x.detach()
    logits = checked_logits(model, x, y)
    sign = -1.0 if targeted else 1.0
    reached = sign * losses.margin(logits, y) >= confidence
    done = fooled_by(logits, y, targeted) & reached
    best, shortest = x.clone(), torch.where(done, 0.0, torch.inf).to(x)
    low, high = torch.zeros_like(shortest), torch.full_like(shortest, _LARGEST_C)
    c = torch.full_like(shortest, initial_c)
    here = (~done).nonzero()[:, 0]
    for _ in range(searches):
        if len(here) == 0:
            break
        search = _Search(sign, confidence, step_size, steps, abort_early)
        found, size = search.descend(model, x[here], y[here], c[here])
        success = size.isfinite()
        nearer = size < shortest[here]
        best[here[nearer]], shortest[here[nearer]] = found[nearer], size[nearer]
        high[here] = torch.where(success, torch.minimum(high[here], c[here]), high[here])
        low[here] = torch.where(success, low[here], torch.maximum(low[here], c[here]))
        middle = (low[here] + high[here]) / 2
        c[here] = torch.where(high[here] < _LARGEST_C, middle, (10 * c[here]).clamp_max(_LARGEST_C))
    return best


@dataclass
class _State:
    """What a search knows of each image that it still moves; the first axis of every tensor is the image."""

    row: Tensor
    x: Tensor
    y: Tensor
    c: Tensor
    w: Tensor
    first: Tensor
    second: Tensor
    value_at_look: Tensor

    def keep(self, chosen: Tensor) -> None:
        """Go on with some of the images."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[chosen])


@dataclass(frozen=True)
class _Search:
    """Adam in tanh space for one value of c per image."""

    sign: float
    confidence: float
    step_size: float
    steps: int
    abort_early: bool

    def descend(self, model: Model, x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest successes N x C x H x W and their l2 distances N, infinite where there was none."""
        found, shortest = x.clone(), torch.full_like(c, torch.inf)
        w = torch.atanh((2 * x - 1) * _INSIDE)
        row = torch.arange(len(x), device=x.device)
        s = _State(row, x, y, c, w, torch.zeros_like(w), torch.zeros_like(w), torch.full_like(c, torch.inf))
        look = -(-self.steps // _LOOKS)
        for step in range(1, self.steps + 1):
            images = (torch.tanh(s.w) + 1) / 2
            lack, logits, push = loss_and_gradient(model, images, s.y, self._lack)
            size = norms.length(images - s.x)
            fooled = fooled_by(logits, s.y, self.sign < 0) & (lack <= 0)
            nearer = fooled & (size < shortest[s.row])
            found[s.row[nearer]], shortest[s.row[nearer]] = images[nearer], size[nearer]
            if self.abort_early and step % look == 0:
                value = size**2 + s.c * lack
                going = value <= 0.9999 * s.value_at_look
                s.value_at_look = value
                if not bool(going.all()):
                    s.keep(going)
                    if len(s.row) == 0:
                        break
                    images, push = images[going], push[going]
            # The gradient to the images from the model, the rest of the chain by hand: d tanh = 1 - tanh^2.
            gradient = 2 * (images - s.x) + norms.per_image(s.c, s.x) * push
            gradient = gradient * 2 * images * (1 - images)
            s.first = _FIRST * s.first + (1 - _FIRST) * gradient
            s.second = _SECOND * s.second + (1 - _SECOND) * gradient**2
            mean, variance = s.first / (1 - _FIRST**step), s.second / (1 - _SECOND**step)
            s.w = s.w - self.step_size * mean / (variance.sqrt() + _FLOOR)
        return found, shortest

    def _lack(self, logits: Tensor, y: Tensor) -> Tensor:
        """How far the margin is from the goal, N, at least 0."""
        return (self.confidence - self.sign * losses.margin(logits, y)).clamp_min(0)


@any_type
@reusing_memory
def deepfool(
    model: Model, x: Tensor, y: Tensor, *, steps: int = 50, candidates: int = 10, overshoot: float = 0.02
) -> Tensor:
    """DeepFool in l2 (Moosavi-Dezfooli et al., CVPR 2016, Algorithm 2), with the result clipped to [0, 1].

    The model is linearised; the image moves to the nearest of the linear boundaries between its label and another
    class, ``|z_l - z_y| / ||w||_2^2 * w`` with ``w = grad z_l - grad z_y``, until the label is lost. The sum of the
    steps is stretched by ``1 + overshoot``, so that the boundary is crossed. As in the authors' code each step
    is also 1e-4 longer.

    ``model``, ``x``, ``y`` and the errors are as for :func:`nndefense.attacks.pgd`.

    Args:
        steps: most linearisations, at least 1: one forward pass and ``candidates`` gradients each.
        candidates: how many classes are looked at, the label among them, at least 2; the rest of them are the
            likeliest of the clean image (10 in the paper).
        overshoot: at least 0; 0.02 in the paper, which is a factor of 1.02.

    Returns:
        The attacked images: same shape, dtype and device as ``x``, in [0, 1]; a point that does not fool the model
        where the steps were not enough, and the clean image where it is already misclassified.
    """
    checked_inputs(model, x, y)
    at_least("steps", steps)
    at_least("candidates", candidates, 2)
    if not overshoot >= 0:
        raise InputError(f"overshoot is {overshoot}, but must be at least 0")
    x = x.detach()
    logits = checked_logits(model, x, y)
    rivals = likeliest_others(logits, y, candidates - 1)
    attacked, total = x.clone(), torch.zeros_like(x)
    here = (~fooled_by(logits, y)).nonzero()[:, 0]
    for _ in range(steps):
        if len(here) == 0:
            break
        step = _nearest_boundary(model, attacked[here], y[here], rivals[here])
        total[here] += step
        attacked[here] = (x[here] + (1 + overshoot) * total[here]).clamp_(0, 1)
        with torch.no_grad():
            here = here[~fooled_by(model(attacked[here]), y[here])]
    return attacked


def _nearest_boundary(model: Model, x: Tensor, y: Tensor, rivals: Tensor) -> Tensor:
    """The step to the nearest linearised boundary, N x C x H x W; ``rivals`` are classes N x R."""
    x = x.requires_grad_(True)
    best, shortest = torch.zeros_like(x), torch.full_like(x.flatten(1)[:, 0], torch.inf)
    with torch.enable_grad():
        logits = model(x)
        gaps = logits.gather(1, rivals) - logits.gather(1, y[:, None])
    columns = gaps.unbind(1)
    for column, gap in enumerate(columns):
        more = column + 1 < len(columns)
        w = gradient_to(x, gap.sum(), keep=more)
        size = norms.length(w).clamp_min(_TINY)
        reach = gap.detach().abs() / size
        nearer = reach < shortest
        step = norms.steepest(w, "l2") * norms.per_image(reach + _LONGER, x)
        best = torch.where(norms.per_image(nearer, x), step, best)
        shortest = torch.where(nearer, reach, shortest)
    return best.detach()
