"""Attacks on retrieval within a fixed budget: an objective each, raised by :func:`~..retrieval.ascent.attack`.

All are ``f(surface, x, y, *, eps, norm, steps, generator, start, random_start, restarts, stride, batch_size, ...)`` ->
attacked images, with arguments, result and errors as :func:`~nndefense.attacks.retrieval.ascent.attack` has them, and
after them the settings of the objective.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nndefense.attacks.retrieval.ascent import attack
from nndefense.attacks.retrieval.objectives import ClassifierLoss, ClassScores, Drift, PushPull, SoftTopK
from nndefense.attacks.retrieval.surface import RetrievalSurface


def soft_top_k(surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, **settings: Any) -> Tensor:
    """Ascent on the soft top-K relaxation R1, re-retrieved every few steps: ``loss``, ``hot``, ``cold``, ``refresh``,
    ``m``, ``target`` and ``hard`` as for :class:`~nndefense.attacks.retrieval.objectives.SoftTopK`.
    """
    return attack(surface, x, y, SoftTopK, eps=eps, **settings)


def straight_through(
    surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, **settings: Any
) -> Tensor:
    """R3: the hard top-K's answer forward, R1's gradient backward (BPDA); settings as for :func:`soft_top_k`.

    The hard answer decides which class the margin compares with.
    """
    return attack(surface, x, y, SoftTopK, eps=eps, hard=True, **settings)


def push_pull(surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, **settings: Any) -> Tensor:
    """Feature push-pull as PGD (Sitawarin & Wagner, arXiv 2003.06559): ``guides``, ``refresh`` and ``target`` as for
    :class:`~nndefense.attacks.retrieval.objectives.PushPull`.
    """
    return attack(surface, x, y, PushPull, eps=eps, **settings)


def class_scores(surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, **settings: Any) -> Tensor:
    """The ASK attack (Wang et al. 2021), from a random start: ``references``, ``temperature`` and ``classes`` as for
    :class:`~nndefense.attacks.retrieval.objectives.ClassScores`.
    """
    return attack(surface, x, y, ClassScores, eps=eps, **{"random_start": True, **settings})


def feature_drift(surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, **settings: Any) -> Tensor:
    """Away from the clean feature, whatever lies there: the attack of those who have no row (L1).

    50 steps by default, from a random draw, since the gradient is 0 at x.
    """
    return attack(surface, x, y, Drift, eps=eps, **{"steps": 50, "random_start": True, **settings})


def pgd_pr(surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, **settings: Any) -> Tensor:
    """PGD-PR, the paper's own attack on neighbours' predictions (Dubey et al. 2019), 50 steps from a random start.

    Raises ``CE(h(x'), y) + gamma * mean_k CE(h(x'), s_k)`` with s_k the posteriors of the clean image's K neighbours in
    the attacker's rows; needs the classifier too.
    """
    return _from_the_classifier(surface, x, y, eps, settings, term="prediction")


def pgd_fs(surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, **settings: Any) -> Tensor:
    """PGD-FS, the paper's own attack in feature space (Dubey et al. 2019), 50 steps from a random start.

    Raises ``CE(h(x'), y) + gamma * mean_k ||phi(x') - phi_k||`` over the clean image's K neighbours in the attacker's
    rows; needs the classifier too.
    """
    return _from_the_classifier(surface, x, y, eps, settings, term="feature")


def gray(surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, **settings: Any) -> Tensor:
    """The classifier's own cross-entropy, the retrieval ignored (L0): the attack that the others must beat."""
    return _from_the_classifier(surface, x, y, eps, settings, term="none")


def _from_the_classifier(
    surface: RetrievalSurface, x: Tensor, y: Tensor, eps: float | Tensor, settings: dict[str, Any], *, term: str
) -> Tensor:
    return attack(surface, x, y, ClassifierLoss, eps=eps, term=term, **{"steps": 50, "random_start": True, **settings})
