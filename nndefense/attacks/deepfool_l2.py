"""DeepFool in l2 (Moosavi-Dezfooli et al., CVPR 2016)."""

from __future__ import annotations

import torch
from torch import Tensor

from nndefense.attacks import norms
from nndefense.attacks.checks import at_least, checked_inputs
from nndefense.attacks.objective import Model, checked_logits, fooled_by, likeliest_others
from nndefense.errors import InputError
from nndefense.memory import reusing_memory

_TINY = 1e-12
# Added to the length of every step, as in the authors' code: where the box eats a part of each step, the rest would
# creep up to the boundary and never cross it.
_LONGER = 1e-4


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
    if not gaps.requires_grad:
        raise InputError("the model's output carries no gradient to the images: attack a differentiable relaxation")
    columns = gaps.unbind(1)
    for column, gap in enumerate(columns):
        more = column + 1 < len(columns)
        (w,) = torch.autograd.grad(gap.sum(), x, retain_graph=more)
        size = norms.length(w).clamp_min(_TINY)
        reach = gap.detach().abs() / size
        nearer = reach < shortest
        step = norms.steepest(w, "l2") * norms.per_image(reach + _LONGER, x)
        best = torch.where(norms.per_image(nearer, x), step, best)
        shortest = torch.where(nearer, reach, shortest)
    return best.detach()
