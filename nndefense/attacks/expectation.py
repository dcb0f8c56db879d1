"""PGD for defences that transform their input, at random or through a part that has only a stand-in for a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from nndefense.attacks import losses, norms
from nndefense.attacks.checks import at_least, checked_inputs
from nndefense.attacks.door import any_type
from nndefense.attacks.losses import Model
from nndefense.memory import reusing_memory

# The first step as a share of the radius; the length falls to 0 in a straight line, which with fresh draws at every
# step is what makes the last steps average over them.
_FIRST_STEP = 0.3
# An image that is wrong on so many draws is not attacked again.
_ENOUGH = 0.95
_TINY = 1e-6


@any_type
@reusing_memory
def eot_pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "normalized-l2",
    steps: int = 60,
    targets: int = 3,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Expectation over transformation (Athalye et al., ICML 2018b, section 2) with what it takes to get far.

    A model that has ``predictions(x, progress)`` is asked for M single answers with fresh draws at every step, and
    for true ones with ``progress=None``, at every step where it says that the others are ``softened``; any other
    model answers once. What is raised is the mean over the answers of ``sigmoid(margin / t)``, t the image's mean
    size of margin at that step: like the number of wrong answers it gains nothing by answers that are far beyond
    the boundary on either side, and unlike cross-entropy it does not fade on a net that is sure. Steps become
    shorter from 0.3 of the radius to 0.

    The first run leaves the class ``y``; images that are still right on some draws then meet a run towards each of
    their likeliest wrong classes. Each image keeps what is wrong on most draws of a fresh set. Where the model makes
    one answer, every step is judged; where it makes several, the last.

    ``model``, ``x``, ``y``, ``eps``, ``norm``, ``generator`` and the errors are as for :func:`nndefense.attacks.pgd`.

    Args:
        steps: gradient steps per run, at least 1.
        targets: wrong classes that runs head for, at least 0.
        restarts: how often all runs are made, at least 1.

    Returns:
        The attacked images: same shape, dtype and device as ``x``, in [0, 1] and inside the ball.
    """
    radii = checked_inputs(model, x, y, eps, norm)
    at_least("steps", steps)
    at_least("restarts", restarts)
    at_least("targets", targets, 0)
    x = x.detach()
    if not len(x):
        return x.clone()
    clean = _answers(model, x)
    losses.checking(lambda logits, y: logits[:, 0])(clean[0], y)
    rivals = losses.likeliest_others(clean.log_softmax(2).logsumexp(0), y, targets) if targets else y[:, None][:, :0]
    best, reached = x.clone(), _reached(clean, y)
    standing = torch.arange(len(x), device=x.device)
    for run in range(restarts * (1 + rivals.shape[1])):
        column = run % (1 + rivals.shape[1]) - 1
        aim = None if column < 0 else rivals[standing, column]
        moved, score = _ascend(model, x[standing], y[standing], aim, radii[standing], norm, steps, generator)
        better = score > reached[standing]
        kept = standing[better]
        best[kept], reached[kept] = moved[better], score[better]
        standing = standing[reached[standing] < _ENOUGH]
        if not len(standing):
            break
    return best


def _ascend(
    model: Model,
    x: Tensor,
    y: Tensor,
    aim: Tensor | None,
    radii: Tensor,
    norm: str,
    steps: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """One run, away from the class or towards another: images N x C x H x W and what they :func:`_reached`, N."""
    inside = norms.projector(x, radii, norm)
    moved = inside(x + norms.random_in_ball(x, radii, norm, generator))
    best, reached = moved, torch.full_like(radii, -torch.inf)
    for step in range(steps):
        leaf = moved.detach().requires_grad_(True)
        with torch.enable_grad():
            answers = _answers(model, leaf, step / steps)
            if aim is None:
                margins = torch.stack([losses.margin(each, y) for each in answers])
            else:
                margins = (_of(answers, aim) - _of(answers, y))[..., 0]
            size = margins.detach().abs().mean(0).clamp_min(_TINY)
            gradient = losses.gradient_to(leaf, torch.sigmoid(margins / size).mean(0).sum())
        if len(answers) == 1:
            # Where what is climbed is no true answer, that is asked for besides.
            true = _answers(model, moved) if getattr(model, "softened", False) else answers.detach()
            best, reached = _better(best, reached, moved, true, y)
        stride = norms.per_image(radii * (_FIRST_STEP * (1 - step / steps)), x)
        moved = inside(torch.addcmul(moved, stride, norms.steepest(gradient, norm)))
    return _better(best, reached, moved, torch.cat([_answers(model, moved), _answers(model, moved)]), y)


def _better(best: Tensor, reached: Tensor, moved: Tensor, answers: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    score = _reached(answers, y)
    better = score > reached
    return torch.where(norms.per_image(better, moved), moved, best), torch.where(better, score, reached)


def _answers(model: Model, x: Tensor, progress: float | None = None) -> Tensor:
    """Single answers of a model: M x N x K; without ``progress`` the true ones, and no gradient."""
    predictions = getattr(model, "predictions", None)
    if predictions is not None:
        found: Tensor = predictions(x, progress)
        return found
    with torch.set_grad_enabled(progress is not None):
        return model(x)[None]


def _of(answers: Tensor, classes: Tensor) -> Tensor:
    """The logits of one class for each image: M x N x K and N -> M x N x 1."""
    return answers.gather(2, classes.expand(len(answers), -1)[..., None])


def _reached(answers: Tensor, y: Tensor) -> Tensor:
    """The share of wrong answers, and among equals by how much they are wrong: N, from 0 to 1."""
    margins = torch.stack([losses.margin(each, y) for each in answers])
    return (margins > 0).double().mean(0) + 1e-3 * (torch.sigmoid(margins).double().mean(0) - 1)
