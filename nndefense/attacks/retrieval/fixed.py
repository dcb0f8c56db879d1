"""Attacks on retrieval within a fixed budget: ``f(surface, x, y, *, eps, norm, steps, ...)`` -> attacked images.

Every one of them returns images of the shape of x, inside the ball and in [0, 1]: the first iterate that the true
pipeline was seen to misclassify, or else the last one.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from nndefense.attacks.retrieval import ascent, objectives
from nndefense.attacks.retrieval.ascent import Problem
from nndefense.attacks.retrieval.surface import RetrievalSurface

BATCH = 100


def soft_top_k(
    surface: RetrievalSurface,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 100,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    random_start: bool = False,
    target: Tensor | None = None,
    loss: str = "margin",
    hot: float = 0.3,
    cold: float = 0.03,
    refresh: int = 10,
    m: int | None = None,
    hard: bool = False,
    stride: float = 1.0,
    batch_size: int = BATCH,
) -> Tensor:
    """Ascent on the soft top-K relaxation R1, re-retrieved every few steps.

    Args:
        surface: L1 with rows, L2 or L3.
        x: clean images, N x C x H x W in [0, 1].
        y: class numbers N.
        eps: radius, one number or one per image; in units of ``norm``.
        norm: ``linf``, ``l2`` or ``normalized-l2``.
        steps: gradient steps, at least 1.
        generator: source of a random start.
        start: where to begin, N x C x H x W, brought into the ball; default x.
        random_start: begin at a uniform draw from the ball instead.
        target: N classes to aim at; default the best other class at each step.
        loss: ``margin``, ``dlr`` (3 classes or more) or ``ce``, all on log p.
        hot, cold: first and last temperature, as multiples of the neighbourhood's spread.
        refresh: steps between two retrievals.
        m: nearest rows looked at, default 4K and at least 32.
        hard: take the hard top-K's answer forward, as :func:`straight_through` does.
        stride: first step in radii.
        batch_size: images attacked at a time, which bounds the memory.

    Returns:
        The attacked images.

    Raises:
        InputError: images, labels or settings that cannot be used, or a surface without rows.
    """
    problem = ascent.pose(surface, x, y, eps, norm, steps=steps)
    rows = problem.surface.need_rows("the soft top-K")

    def attack(part: Problem, begin: Tensor, aim: Tensor | None) -> Tensor:
        objective = objectives.SoftTopK(
            rows, surface.k, loss=loss, hard=hard, target=aim, m=m, refresh=refresh, hot=hot, cold=cold
        )
        return ascent.ascend(part, objective, begin, steps=steps, stride=stride)[0]

    return ascent.in_batches(attack, problem, _start(problem, start, random_start, generator), target, batch_size)


def straight_through(
    surface: RetrievalSurface,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 100,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    """R3: the hard top-K's answer forward, R1's gradient backward (BPDA); options as for :func:`soft_top_k`.

    The hard answer decides which class the margin compares with.
    """
    return soft_top_k(surface, x, y, eps=eps, norm=norm, steps=steps, generator=generator, hard=True, **options)


def push_pull(
    surface: RetrievalSurface,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 100,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    random_start: bool = False,
    target: Tensor | None = None,
    guides: int | None = None,
    refresh: int = 5,
    stride: float = 1.0,
    batch_size: int = BATCH,
) -> Tensor:
    """Feature push-pull as PGD (Sitawarin & Wagner, arXiv 2003.06559).

    Args and errors as for :func:`soft_top_k`; ``guides`` rows are pulled or pushed, half of each; default 2K, at least
    2 and at most 100: more guides of the wrong class than the K-ball can hold pull against each other.
    """
    problem = ascent.pose(surface, x, y, eps, norm, steps=steps)
    rows = problem.surface.need_rows("push-pull")
    number = min(max(2 * surface.k, 2), 100) if guides is None else guides

    def attack(part: Problem, begin: Tensor, aim: Tensor | None) -> Tensor:
        objective = objectives.PushPull(rows, surface.k, guides=number, refresh=refresh, target=aim)
        return ascent.ascend(part, objective, begin, steps=steps, stride=stride)[0]

    return ascent.in_batches(attack, problem, _start(problem, start, random_start, generator), target, batch_size)


def class_scores(
    surface: RetrievalSurface,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 100,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    random_start: bool = True,
    references: int = 5,
    temperature: float = 0.1,
    classes: int = 10,
    stride: float = 1.0,
    batch_size: int = BATCH,
) -> Tensor:
    """The ASK attack (Wang et al. 2021): cross-entropy of class scores.

    Args and errors as for :func:`soft_top_k`; ``references`` rows per class, found once from the clean image, of the
    true class and of the ``classes`` nearest others; ``temperature`` in units of feature distance.
    """
    problem = ascent.pose(surface, x, y, eps, norm, steps=steps)
    rows = problem.surface.need_rows("ASK")

    def attack(part: Problem, begin: Tensor, aim: Tensor | None) -> Tensor:
        objective = objectives.ClassScores(rows, references=references, temperature=temperature, classes=classes)
        return ascent.ascend(part, objective, begin, steps=steps, stride=stride)[0]

    return ascent.in_batches(attack, problem, _start(problem, start, random_start, generator), None, batch_size)


def feature_drift(
    surface: RetrievalSurface,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 50,
    generator: torch.Generator | None = None,
    stride: float = 1.0,
    batch_size: int = BATCH,
) -> Tensor:
    """Away from the clean feature, whatever lies there: the attack of those who have no row (L1).

    Args and errors as for :func:`soft_top_k`. Begins at a random draw, since the gradient is 0 at x.
    """
    problem = ascent.pose(surface, x, y, eps, norm, steps=steps)
    problem.surface.need_features("feature drift")

    def attack(part: Problem, begin: Tensor, aim: Tensor | None) -> Tensor:
        return ascent.ascend(part, objectives.Drift(), begin, steps=steps, stride=stride)[0]

    return ascent.in_batches(attack, problem, problem.random_start(generator), None, batch_size)


def pgd_pr(
    surface: RetrievalSurface,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 50,
    generator: torch.Generator | None = None,
    gamma: float = 1.0,
    random_start: bool = True,
    stride: float = 1.0,
    batch_size: int = BATCH,
) -> Tensor:
    """PGD-PR, the paper's own attack on neighbours' predictions (Dubey et al. 2019).

    Raises ``CE(h(x'), y) + gamma * mean_k CE(h(x'), s_k)`` with s_k the posteriors of the clean image's K neighbours in
    the attacker's rows. Other args and errors as for :func:`soft_top_k`; needs the classifier too.
    """
    return _paper("prediction", surface, x, y, eps, norm, steps, generator, gamma, random_start, stride, batch_size)


def pgd_fs(
    surface: RetrievalSurface,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 50,
    generator: torch.Generator | None = None,
    gamma: float = 1.0,
    random_start: bool = True,
    stride: float = 1.0,
    batch_size: int = BATCH,
) -> Tensor:
    """PGD-FS, the paper's own attack in feature space (Dubey et al. 2019).

    Raises ``CE(h(x'), y) + gamma * mean_k ||phi(x') - phi_k||`` over the clean image's K neighbours in the attacker's
    rows. Other args and errors as for :func:`soft_top_k`; needs the classifier too.
    """
    return _paper("feature", surface, x, y, eps, norm, steps, generator, gamma, random_start, stride, batch_size)


def gray(
    surface: RetrievalSurface,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 50,
    generator: torch.Generator | None = None,
    random_start: bool = True,
    stride: float = 1.0,
    batch_size: int = BATCH,
) -> Tensor:
    """The classifier's own cross-entropy, the retrieval ignored (L0): the attack that the others must beat."""
    problem = ascent.pose(surface, x, y, eps, norm, steps=steps)
    classify = problem.surface.need_classifier("the gray-box attack")

    def attack(part: Problem, begin: Tensor, aim: Tensor | None) -> Tensor:
        objective = objectives.ClassifierLoss(classify)
        return ascent.ascend(part, objective, begin, steps=steps, stride=stride, use_features=False)[0]

    return ascent.in_batches(attack, problem, _start(problem, None, random_start, generator), None, batch_size)


def _paper(
    term: Literal["prediction", "feature"],
    surface: RetrievalSurface,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    norm: str,
    steps: int,
    generator: torch.Generator | None,
    gamma: float,
    random_start: bool,
    stride: float,
    batch_size: int,
) -> Tensor:
    problem = ascent.pose(surface, x, y, eps, norm, steps=steps)
    rows = problem.surface.need_rows("the paper's attack")
    classify = problem.surface.need_classifier("the paper's attack")

    def attack(part: Problem, begin: Tensor, aim: Tensor | None) -> Tensor:
        objective = objectives.ClassifierLoss(classify, rows, term=term, gamma=gamma)
        return ascent.ascend(part, objective, begin, steps=steps, stride=stride, use_features=term == "feature")[0]

    return ascent.in_batches(attack, problem, _start(problem, None, random_start, generator), None, batch_size)


def _start(problem: Problem, start: Tensor | None, random_start: bool, generator: torch.Generator | None) -> Tensor:
    if start is not None:
        return problem.bring_in(start.to(problem.x))
    return problem.random_start(generator) if random_start else problem.x
