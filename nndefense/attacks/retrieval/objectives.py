"""The attacks on retrieval within a fixed budget, and their objectives, each renewed from the attacker's rows.

All attacks: ``f(surface, x, y, *, eps, norm, steps, generator, start, random_start, restarts, stride, batch_size,
...)`` -> attacked images, with arguments, result and errors as
:func:`~nndefense.attacks.retrieval.ascent.attack` has them, and after them the settings of the objective.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nndefense.attacks.losses import find_loss, margin
from nndefense.attacks.retrieval import relaxation
from nndefense.attacks.retrieval.ascent import Objective, Problem, Raised, attack
from nndefense.attacks.retrieval.relaxation import Neighborhood
from nndefense.attacks.retrieval.surface import RetrievalSurface, Rows
from nndefense.errors import InputError, check_choice

LOSSES = ("margin", "dlr", "cross-entropy")


class SoftTopK(Objective):
    """R1 or R3 of :mod:`~nndefense.attacks.retrieval.relaxation`, re-retrieved every few steps, T annealed.

    T falls geometrically from ``hot`` to ``cold`` times the spread that the neighbourhood had at first.

    Args:
        surface: L1 with rows, L2 or L3.
        loss: ``margin``, ``dlr`` (3 classes or more) or ``cross-entropy``, all on log p.
        hard: take the hard top-K's answer forward.
        target: N classes to aim at; default the best other class at each step.
        m: nearest rows looked at, default 4K and at least 32.
        others: nearest rows of other classes looked at besides.
        refresh: steps between two retrievals.
        hot, cold: first and last temperature, as multiples of the neighbourhood's spread.
    """

    state = ("hood", "y", "target")
    hood: Neighborhood

    def __init__(
        self,
        surface: RetrievalSurface,
        *,
        loss: str = "margin",
        hard: bool = False,
        target: Tensor | None = None,
        m: int | None = None,
        others: int = 32,
        refresh: int = 10,
        hot: float = 0.3,
        cold: float = 0.03,
    ) -> None:
        check_choice("loss", loss, LOSSES)
        if not 0 < cold <= hot:
            raise InputError(f"the temperatures go from {hot} to {cold}, but must fall and stay above 0")
        self.rows, self.k = surface.need_rows("the soft top-K"), surface.k
        self.loss, self.hard, self.target = find_loss(loss), hard, target
        self.m, self.others, self.refresh = max(4 * self.k, 32) if m is None else m, others, refresh
        self.hot, self.cold = hot, cold

    def renew(self, problem: Problem, features: Tensor) -> None:
        """Retrieve again."""
        self.y = problem.y
        spread = self.hood.spread if hasattr(self, "hood") else None
        self.hood = relaxation.retrieve(self.rows, features, problem.y, self.k, m=self.m, others=self.others)
        # One scale for the whole run, so that the annealing alone moves the temperature.
        if spread is not None:
            self.hood.spread = spread

    def value(self, images: Tensor, features: Tensor, progress: float) -> Raised:
        """The loss on log p."""
        temperature = self.hot * (self.cold / self.hot) ** progress
        distances = self.hood.distances(features)
        log_p = relaxation.soft_log_probabilities(self.hood, features, self.k, temperature, distances=distances)
        hard = relaxation.hard_log_probabilities(self.hood, distances.detach(), self.k)
        if self.hard:
            log_p = relaxation.straight_through(hard, log_p)
        loss = self.loss(log_p, self.y) if self.target is None else relaxation.towards(log_p, self.y, self.target)
        score = margin(hard, self.y) if self.target is None else relaxation.towards(hard, self.y, self.target)
        return Raised(loss, score, hard.argmax(1) != self.y)


class PushPull(Objective):
    """Feature push-pull (Sitawarin & Wagner, arXiv 2003.06559).

    Lowers ``sum_i ReLU(a_i (d_i^2 - tau) + margin)`` over m/2 rows of the wrong class to be pulled into the K-ball
    (a = 1) and m/2 rows of the true class to be pushed out of it (a = -1); tau is the current K-th squared distance.
    Guides and tau are found again every ``refresh`` steps. The wrong class is the target, or the class of smallest
    mean distance over its m/2 nearest rows. ``guides`` is m; see :func:`half_of_guides`.
    """

    state = ("hood", "y", "target")
    hood: Neighborhood

    def __init__(
        self,
        surface: RetrievalSurface,
        *,
        guides: int | None = None,
        refresh: int = 5,
        target: Tensor | None = None,
    ) -> None:
        self.rows, self.k = surface.need_rows("push-pull"), surface.k
        self.half, self.refresh, self.target = half_of_guides(guides, self.k), refresh, target

    def renew(self, problem: Problem, features: Tensor) -> None:
        """Find guides."""
        self.y = problem.y
        if self.target is None:
            self.target = wrong_classes(self.rows, features, problem.y, 1, self.half)[:, 0]
        self.hood = guides(self.rows, features, problem.y, self.target, self.half, self.k)

    def value(self, images: Tensor, features: Tensor, progress: float) -> Raised:
        """Minus the hinge sum."""
        distances = self.hood.distances(features)
        hard = relaxation.hard_log_probabilities(self.hood, distances.detach(), self.k)
        return Raised(-hinge_sum(self.hood, distances, self.y, self.k), fooled=hard.argmax(1) != self.y)


def half_of_guides(guides: int | None, k: int) -> int:
    """How many guides pull, and how many push: of 2K, at least 2 and at most 100, where no number is given.

    More guides of the wrong class than the K-ball can hold pull against each other.

    Raises:
        InputError: fewer than 2.
    """
    guides = min(max(2 * k, 2), 100) if guides is None else guides
    if guides < 2:
        raise InputError(f"guides is {guides}, but must be at least 2: one to pull and one to push")
    return guides // 2


def guides(rows: Rows, features: Tensor, y: Tensor, target: Tensor, half: int, k: int) -> Neighborhood:
    """The ``half`` nearest rows of the target class and the ``half`` nearest of class y, then the K nearest of all."""
    half = min(half, rows.count)
    pull, own = rows.nearest(features, half, of=target), rows.nearest(features, half, of=y)
    around = rows.nearest(features, min(k + 1, rows.count))
    found = torch.cat([pull[1], own[1]], 1)
    distances = torch.cat([pull[0], own[0], around[0]], 1)
    # Rows of a third class near by decide on the answer too, but are neither pulled nor pushed.
    third = ~(around[1].unsqueeze(2) == found.unsqueeze(1)).any(2)
    filled = torch.isfinite(distances) & torch.cat([torch.ones_like(found, dtype=torch.bool), third], 1)
    near = torch.cat([found, around[1]], 1)
    hood = Neighborhood.of(rows, near, filled, torch.ones_like(features[:, 0]))
    hood.classes[:, found.shape[1] :] = -1
    # Their votes are no longer told by their classes.
    hood.sole = False
    return hood


def hinge_sum(
    hood: Neighborhood,
    distances: Tensor,
    y: Tensor,
    k: int,
    *,
    active: Tensor | None = None,
    half: int = 0,
    slack: float = 1e-5,
) -> Tensor:
    """``sum_i ReLU(a_i (d_i^2 - tau) + slack)`` over the guides: N.

    ``active`` (N) keeps only that many of the first ``half`` places, which pull, and of the next, which push.
    """
    filled = torch.isfinite(distances)
    squared = torch.where(filled, distances, 0.0).square()
    tau = relaxation.threshold(distances, k).square()
    side = torch.where(hood.classes == y.unsqueeze(1), -1.0, 1.0).masked_fill((hood.classes < 0) | ~filled, 0.0)
    if active is not None:
        place = torch.arange(side.shape[1], device=side.device)
        rank = torch.where(place < half, place, place - half).clamp_min(0)
        side = side.masked_fill((rank >= active.unsqueeze(1)) & (place < 2 * half), 0.0)
    return (F.relu(side * (squared - tau) + slack) * side.abs()).sum(1)


def wrong_classes(rows: Rows, features: Tensor, y: Tensor, count: int, half: int) -> Tensor:
    """The ``count`` classes other than y that are nearest by the mean distance of their ``half`` nearest rows.

    N x count; filled up with the last one where fewer classes have rows. Only classes among the nearest rows of
    other classes are ranked, so that the search does not grow with the number of classes.
    """
    far, found = rows.nearest(features, min(max(16 * half, 64), rows.count), but=y)
    posteriors = rows.posteriors(found)
    classes = posteriors.argmax(2)
    number = posteriors.shape[2]
    scores = torch.full((len(features), number), torch.inf, device=features.device, dtype=far.dtype)
    for c in torch.unique(classes).tolist():
        own = torch.where(classes == c, far, torch.inf)
        nearest = own.topk(min(half, own.shape[1]), dim=1, largest=False).values
        present = torch.isfinite(nearest)
        mean = torch.where(present, nearest, 0.0).sum(1) / present.sum(1).clamp_min(1)
        # A class with few rows in sight is farther than one with all of them, whatever these few look like.
        missing = (~present).sum(1) * far.masked_fill(torch.isinf(far), 0.0).amax(1) / nearest.shape[1]
        scores[:, c] = torch.where(present.any(1), mean * present.sum(1) / nearest.shape[1] + missing, torch.inf)
    scores.scatter_(1, y.unsqueeze(1), torch.inf)
    count = min(count, number - 1)
    values, order = scores.topk(count, dim=1, largest=False)
    return torch.where(torch.isfinite(values), order, order[:, :1])


class ClassScores(Objective):
    """ASK (Wang et al. 2021): cross-entropy of class scores from fixed references.

    A class's score is the mean of ``-||phi(x') - phi_ref|| / T`` over its ``references`` nearest ones, found once from
    the clean image, of the true class and of the ``classes`` nearest others; ``temperature`` is T, a feature distance.
    """

    state = ("vectors",)

    def __init__(
        self, surface: RetrievalSurface, *, references: int = 5, temperature: float = 0.1, classes: int = 10
    ) -> None:
        if references < 1 or temperature <= 0 or classes < 1:
            raise InputError("ASK needs at least 1 reference, 1 other class and a temperature above 0")
        self.rows = surface.need_rows("ASK")
        self.references, self.temperature, self.others = references, temperature, classes

    def renew(self, problem: Problem, features: Tensor) -> None:
        """Find the references, at the first step only and around the clean images."""
        clean = problem.clean_features()
        order = wrong_classes(self.rows, clean, problem.y, self.others, self.references)
        wanted = torch.cat([problem.y.unsqueeze(1), order], 1)  # N x classes, the true one first
        found = []
        for c in wanted.unbind(1):
            distances, rows = self.rows.nearest(clean, min(self.references, self.rows.count), of=c)
            # A class with fewer rows than references repeats its nearest.
            found.append(self.rows.vectors(torch.where(torch.isfinite(distances), rows, rows[:, :1])))
        self.vectors = torch.stack(found, 1)  # N x classes x references x d

    def value(self, images: Tensor, features: Tensor, progress: float) -> Raised:
        """Cross-entropy of the class scores."""
        distances = (features[:, None, None] - self.vectors).square().sum(3).clamp_min(1e-12).sqrt()
        scores = -distances.mean(2) / self.temperature
        return Raised(scores.logsumexp(1) - scores[:, 0])


class Drift(Objective):
    """Away from the clean image's own feature: raises ``||phi(x') - phi(x)||``; needs no row."""

    state = ("origin",)

    def __init__(self, surface: RetrievalSurface) -> None:
        surface.need_features("feature drift")

    def renew(self, problem: Problem, features: Tensor) -> None:
        """Note where the clean images lie."""
        self.origin = problem.clean_features()

    def value(self, images: Tensor, features: Tensor, progress: float) -> Raised:
        """The squared distance, whose direction is the distance's own and is 0 only at the clean image."""
        return Raised((features - self.origin).square().sum(1))


class ClassifierLoss(Objective):
    """Cross-entropy of the classifier, plus what the paper's own attacks add to it (Dubey et al. 2019).

    With ``term`` ``prediction`` (PGD-PR) ``gamma * mean_k CE(h(x'), s_k)``, s_k the posteriors of the clean image's K
    neighbours; with ``feature`` (PGD-FS) ``gamma * mean_k ||phi(x') - phi_k||``; with ``none`` nothing. Forms and gamma
    are ours, since the paper's could not be established; the sum over k is a mean here, so that gamma means the same
    for every K.
    """

    state = ("y", "around")

    def __init__(self, surface: RetrievalSurface, *, term: str = "none", gamma: float = 1.0) -> None:
        if not 0 <= gamma < float("inf"):
            raise InputError(f"gamma is {gamma}, but must be at least 0")
        whose = "the gray-box attack" if term == "none" else "the paper's attack"
        self.rows = None if term == "none" else surface.need_rows(whose)
        self.classify = surface.need_classifier(whose)
        self.term, self.gamma, self.looks_at_features = term, gamma, term == "feature"

    def renew(self, problem: Problem, features: Tensor) -> None:
        """Find the clean images' neighbours."""
        self.y, self.around = problem.y, problem.y
        if self.rows is not None:
            _, found = self.rows.nearest(problem.clean_features(), min(problem.surface.k, self.rows.count))
            self.around = self.rows.posteriors(found) if self.term == "prediction" else self.rows.vectors(found)

    def value(self, images: Tensor, features: Tensor, progress: float) -> Raised:
        """Cross-entropy and the term."""
        log_p = self.classify(images).log_softmax(1)
        loss = -log_p.gather(1, self.y.unsqueeze(1)).squeeze(1)
        if self.term == "prediction":
            loss = loss - self.gamma * (self.around.mean(1) * log_p).sum(1)
        elif self.term == "feature":
            distances = (features.unsqueeze(1) - self.around).square().sum(2).clamp_min(1e-12).sqrt()
            loss = loss + self.gamma * distances.mean(1)
        return Raised(loss)


def soft_top_k(surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, **settings: Any) -> Tensor:
    """Ascent on the soft top-K relaxation R1, re-retrieved every few steps: ``loss``, ``hot``, ``cold``, ``refresh``,
    ``m``, ``target`` and ``hard`` as for :class:`~nndefense.attacks.retrieval.objectives.SoftTopK`.

    Args:
        surface: what the attacker holds.
        x: clean images, N x C x H x W in [0, 1].
        y: their class numbers, N.
        eps: radius, one number or N, in units of the norm.
        **settings: those above, ``norm``, ``steps``, ``generator`` and whatever else
            :func:`~nndefense.attacks.retrieval.ascent.attack` takes, which says what is returned and raised: of this
            attack and of those below.
    """
    return attack(surface, x, y, SoftTopK, eps=eps, **settings)


def straight_through(
    surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, **settings: Any
) -> Tensor:
    """R3: the hard top-K's answer forward, R1's gradient backward (BPDA).

    The hard answer decides which class the margin compares with. ``surface``, ``x``, ``y``, ``eps`` and other
    ``settings`` as for :func:`soft_top_k`.
    """
    return attack(surface, x, y, SoftTopK, eps=eps, hard=True, **settings)


def push_pull(surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, **settings: Any) -> Tensor:
    """Feature push-pull as PGD (Sitawarin & Wagner, arXiv 2003.06559): ``guides``, ``refresh`` and ``target`` as for
    :class:`~nndefense.attacks.retrieval.objectives.PushPull`.
    ``surface``, ``x``, ``y``, ``eps`` and other ``settings`` as for :func:`soft_top_k`.
    """
    return attack(surface, x, y, PushPull, eps=eps, **settings)


def class_scores(surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, **settings: Any) -> Tensor:
    """The ASK attack (Wang et al. 2021), from a random start: ``references``, ``temperature`` and ``classes`` as for
    :class:`~nndefense.attacks.retrieval.objectives.ClassScores`.
    ``surface``, ``x``, ``y``, ``eps`` and other ``settings`` as for :func:`soft_top_k`.
    """
    return attack(surface, x, y, ClassScores, eps=eps, **{"random_start": True, **settings})


def feature_drift(surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, **settings: Any) -> Tensor:
    """Away from the clean feature, whatever lies there: the attack of those who have no row (L1).

    50 steps by default, from a random draw, since the gradient is 0 at x.
    ``surface``, ``x``, ``y``, ``eps`` and other ``settings`` as for :func:`soft_top_k`.
    """
    return attack(surface, x, y, Drift, eps=eps, **{"steps": 50, "random_start": True, **settings})


def pgd_pr(surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, **settings: Any) -> Tensor:
    """PGD-PR, the paper's own attack on neighbours' predictions (Dubey et al. 2019), 50 steps from a random start.

    Raises ``CE(h(x'), y) + gamma * mean_k CE(h(x'), s_k)`` with s_k the posteriors of the clean image's K neighbours in
    the attacker's rows; needs the classifier too. ``surface``, ``x``, ``y``, ``eps`` and other ``settings`` as for
    :func:`soft_top_k`.
    """
    return _from_the_classifier(surface, x, y, eps, settings, term="prediction")


def pgd_fs(surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, **settings: Any) -> Tensor:
    """PGD-FS, the paper's own attack in feature space (Dubey et al. 2019), 50 steps from a random start.

    Raises ``CE(h(x'), y) + gamma * mean_k ||phi(x') - phi_k||`` over the clean image's K neighbours in the attacker's
    rows; needs the classifier too. ``surface``, ``x``, ``y``, ``eps`` and other ``settings`` as for :func:`soft_top_k`.
    """
    return _from_the_classifier(surface, x, y, eps, settings, term="feature")


def gray(surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, **settings: Any) -> Tensor:
    """The classifier's own cross-entropy, the retrieval ignored (L0): the attack that the others must beat.

    ``surface``, ``x``, ``y``, ``eps`` and other ``settings`` as for :func:`soft_top_k`.
    """
    return _from_the_classifier(surface, x, y, eps, settings, term="none")


def _from_the_classifier(
    surface: RetrievalSurface, x: Tensor, y: Tensor, eps: float | Tensor, settings: dict[str, Any], *, term: str
) -> Tensor:
    return attack(surface, x, y, ClassifierLoss, eps=eps, term=term, **{"steps": 50, "random_start": True, **settings})
