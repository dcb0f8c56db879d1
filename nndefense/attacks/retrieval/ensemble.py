"""The adaptive attack: several attacks on retrieval, one after another, on the images that still stand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nndefense.attacks.checks import at_least
from nndefense.attacks.door import wide_types
from nndefense.attacks.losses import margin
from nndefense.attacks.retrieval import ascent
from nndefense.attacks.retrieval.accepted import Accepted, Combine, Decision, hinged, selective
from nndefense.attacks.retrieval.aims import Aims, from_rows, relinked
from nndefense.attacks.retrieval.ascent import BATCH, Objective, Problem
from nndefense.attacks.retrieval.objectives import ClassifierLoss, Drift, SoftTopK
from nndefense.attacks.retrieval.ranks import AnswerMargin, RankMargin
from nndefense.attacks.retrieval.surface import Counts, RetrievalSurface
from nndefense.memory import reusing_memory

# Wrong classes aimed at, rows of each that are tried as a beginning, and beginnings that are kept.
CLASSES, POOL, KEPT = 9, 16, 2
_NUMBERS = 1 << 21


@dataclass(frozen=True)
class Round:
    """A round of successive halving: ``steps`` as a share of the attack's, on the best ``keep`` aims of an image.

    ``hot`` and ``cold`` are temperatures of :class:`~nndefense.attacks.retrieval.ranks.RankMargin`, ``stride`` is the
    first step in radii.
    """

    name: str
    steps: float
    keep: int
    hot: float
    cold: float
    stride: float


# Cheap rounds on many aims first, long ones on the few that came nearest; what falls costs no further step. The last
# rounds are cold, with small steps: the best points lie where several rows are equally far, which a warm mean blurs.
SCHEDULE = (
    Round("all aims", 0.15, (CLASSES + 1) * KEPT, 0.2, 0.002, 1.0),
    Round("best 6", 0.4, 6, 0.05, 0.0005, 0.5),
    Round("best 3", 0.8, 3, 0.05, 0.0002, 0.5),
)
RELINKING = Round("relinked", 0.4, 4, 0.05, 0.0005, 0.5)
ROUNDS = 3
ACCEPTED = Round("aims", 0.4, 3, 0.2, 0.002, 1.0)


@dataclass(frozen=True)
class AdaptiveResult:
    """What the adaptive attack found.

    Attributes:
        images: N x C x H x W: the first image that the true pipeline misclassified, else the one on which the margin
            of the true pipeline's log-probabilities was smallest. Where it may abstain, it must also accept the image.
        fooled: N, by the true pipeline, from one last prediction of ``images``.
        margins: N, ``max_{c != y} log p_c - log p_y`` of the true pipeline on ``images``; where it may abstain, the
            smaller of that and of how far the score stays below the threshold.
        stages: N names: the stage that broke each image; ``clean`` where the clean image is misclassified already, ""
            where it stands.
        broken: for each stage that ran, in order, how many images it broke.
        counts: what it cost.
        seconds: wall time.
    """

    images: Tensor
    fooled: Tensor
    margins: Tensor
    stages: tuple[str, ...]
    broken: dict[str, int]
    counts: Counts
    seconds: float


def adaptive(surface: RetrievalSurface, x: Tensor, y: Tensor, *, eps: float | Tensor, **settings: Any) -> Tensor:
    """The attacked images, N x C x H x W, of :func:`run_adaptive`: ``surface``, ``x``, ``y``, ``eps``, the other
    ``settings`` and errors as there.
    """
    return run_adaptive(surface, x, y, eps=eps, **settings).images


@wide_types
@reusing_memory
def run_adaptive(
    surface: RetrievalSurface,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 100,
    generator: torch.Generator | None = None,
    restarts: int = 1,
    start: Tensor | Sequence[Tensor] | None = None,
    batch_size: int = BATCH,
) -> AdaptiveResult:
    """Attack with everything that the attacker's knowledge allows, and let the true pipeline judge each image.

    The worst case per image over: the clean image; ``start``, where it is given; and, on what still stands,

    1. a short ascent on the rank margin for any class but y;
    2. the classifier's own cross-entropy, the retrieval ignored, and 1 again from the worst point so far;
    3. for each wrong class by itself the row images that come nearest to its majority, in rounds of successive
       halving (:data:`SCHEDULE`): short ascents on all of them, long ones on the best;
    4. path relinking: the best points mixed with the images of the rows around them, with noise, and raised again;
    5. the soft top-K from the worst point, which sees posteriors and weights as they are.

    Of a defence with a kernel or a share of the classifier, 3 and 4 raise the margin of its own answer
    (:class:`~nndefense.attacks.retrieval.ranks.AnswerMargin`), which is raised for any class before them, too: from the
    clean images and from the worst point.

    What needs more than the surface has is left out: at L0 only 2 is left, at L1 without rows also feature drift.
    Where the surface may reject, images must also be accepted, and in the place of 1 to 5 stands the answer's own
    margin from a random draw and from the worst point, 1 (of a defence with a kernel or a share of the classifier the
    margin of its own answer), and one round of 3: about 3 times ``steps`` gradients.

    Args:
        surface, x, y, eps, norm, generator, batch_size: as for :func:`~nndefense.attacks.retrieval.ascent.attack`.
        steps: what the shares of :data:`SCHEDULE` are of; an image that stands costs about 13 times as many gradients.
        restarts: at least 1; each more adds a round of path relinking and one of the classifier's, from other draws.
        start: images of another attack inside the ball, such as the gray-box attack's, or of several: this one is then
            never weaker.

    Raises:
        InputError: images, labels or settings that cannot be used.
    """
    begun = time.perf_counter()
    problem = ascent.pose(surface, x, y, eps, norm, steps=steps)
    at_least("restarts", restarts)
    at_least("the batch size", batch_size)
    before = Counts(**vars(surface.counts))
    best, margins = problem.x.clone(), torch.full_like(problem.radii, -torch.inf)
    stages, broken = [""] * len(x), {"clean": 0}
    for index in torch.split(torch.arange(len(x), device=x.device), batch_size):
        run = _Run(problem.take(index), steps, generator)
        run.offer("clean", run.problem.x)
        for one in [start] if isinstance(start, Tensor) else start or ():
            run.offer("start", run.problem.bring_in(one[index].to(x))[run.standing])
        run.everything(restarts)
        best[index], margins[index] = run.best, run.margins
        for place, name in zip(index.tolist(), run.stages, strict=True):
            stages[place] = name
        for name, number in run.broken.items():
            broken[name] = broken.get(name, 0) + number
    # The last word: one prediction of the final images, in batches like any other user's.
    places = torch.split(torch.arange(len(x), device=x.device), batch_size)
    judged = [_judged(problem.surface, best[place], problem.y[place]) for place in places if len(place)]
    final, fooled = map(torch.cat, zip(*judged, strict=True)) if judged else (margins, margins > 0)
    spent = Counts(**{name: count - getattr(before, name) for name, count in vars(surface.counts).items()})
    return AdaptiveResult(best, fooled, final, tuple(stages), broken, spent, time.perf_counter() - begun)


class _Run:
    """One batch under attack: which images stand, and the best that was found for each."""

    def __init__(self, problem: Problem, steps: int, generator: torch.Generator | None) -> None:
        self.problem, self.steps, self.generator = problem, steps, generator
        self.best = problem.x.clone()
        self.margins = torch.full_like(problem.radii, -torch.inf)
        self.standing = torch.ones(len(problem.x), dtype=torch.bool, device=problem.x.device)
        self.stages, self.broken = [""] * len(problem.x), dict[str, int]()

    def left(self) -> Tensor:
        """The images that stand."""
        return self.standing.nonzero()[:, 0]

    def offer(self, name: str, images: Tensor, index: Tensor | None = None) -> None:
        """Show images of the standing (or of ``index``, where one may come twice) to the true pipeline; keep the worst
        for it."""
        index = self.left() if index is None else index
        self.broken.setdefault(name, 0)
        if not len(index):
            return
        y = self.problem.y[index]
        margins, fooled = _judged(self.problem.surface, images, y)
        # Decided on the host, so that a GPU waits once and not for each image.
        scores = list(zip(fooled.tolist(), margins.tolist(), strict=True))
        worst: dict[int, int] = {}
        for place, image in enumerate(index.tolist()):
            if image not in worst or scores[place] > scores[worst[image]]:
                worst[image] = place
        stood, before = self.standing.tolist(), self.margins.tolist()
        worst = {i: place for i, place in worst.items() if scores[place] > (not stood[i], before[i])}
        held, shown = (
            torch.tensor([*worst], device=y.device).long(),
            torch.tensor([*worst.values()], device=y.device).long(),
        )
        self.best[held], self.margins[held] = images[shown], margins[shown]
        self.standing[held] &= ~fooled[shown]
        for image, place in worst.items():
            if scores[place][0] and stood[image]:
                self.stages[image] = name
                self.broken[name] += 1

    def everything(self, restarts: int) -> None:
        """All that the surface allows, while anything stands."""
        surface = self.problem.surface
        if surface.rejection is not None:
            self.everything_accepted(restarts)
            return
        if surface.rows is not None:
            self.ascend("any class", RankMargin(surface), self.problem.x, 0.15)
        self.gray()
        aims = None
        if surface.rows is not None:
            self.ascend("any class, from the worst", RankMargin(surface), self.best, 0.15)
            if surface.smooth:
                self.ascend("answer", AnswerMargin(surface), self.problem.x, 0.4)
                self.ascend("answer, from the worst", AnswerMargin(surface), self.best, 0.4)
            aims = self.halving()
            self.ascend("soft top-K", SoftTopK(surface), self.best, 0.4)
        elif surface.features is not None:
            self.ascend("drift", Drift(surface), self.problem.random_start(self.generator), 0.4)
        for _ in range(restarts - 1):
            aims = self.relink(aims)
            self.gray()

    def everything_accepted(self, restarts: int) -> None:
        """A wrong answer that is accepted, too: the answer's margin, and the retrieval's aims in one round."""
        surface = self.problem.surface
        for _ in range(restarts):
            self.ascend("answer", Decision(surface), self.problem.random_start(self.generator), 0.4)
            self.ascend("answer, by hinges", Decision(surface), self.best, 0.4, hinged)
        if surface.rows is not None and self.standing.any():
            # A kernel or the classifier's share moves the answer where no rank changes.
            objective = AnswerMargin(surface) if surface.smooth else RankMargin(surface)
            self.ascend("any class, from the worst", objective, self.best, 0.2)
            aims = from_rows(self.problem, self.left(), classes=CLASSES, pool=POOL, keep=KEPT)
            self.climb(aims.best(ACCEPTED.keep, self.standing), ACCEPTED)
            self.ascend("answer, from the worst", Decision(surface), self.best, 0.4)

    def gray(self) -> None:
        """The classifier's own loss, from a random draw."""
        if self.problem.surface.classify is not None:
            objective = ClassifierLoss(self.problem.surface)
            self.ascend("gray", objective, self.problem.random_start(self.generator), 0.4)

    def halving(self) -> Aims | None:
        """Aims for each class by itself, in :data:`SCHEDULE`, and path relinking after them."""
        aims: Aims | None = None
        if self.standing.any():
            aims = from_rows(self.problem, self.left(), classes=CLASSES, pool=POOL, keep=KEPT)
            for planned in SCHEDULE:
                aims = self.climb(aims.best(planned.keep, self.standing), planned)
        for _ in range(ROUNDS):
            aims = self.relink(aims)
        return aims

    def relink(self, aims: Aims | None) -> Aims | None:
        """A round of path relinking from the best aims so far, which it joins."""
        if aims is None or not self.standing.any():
            return aims
        again = relinked(self.problem, aims.best(2, self.standing), self.generator, pool=POOL // 2, keep=KEPT)
        return Aims.together([aims, self.climb(again.best(RELINKING.keep, self.standing), RELINKING)])

    def climb(self, aims: Aims, planned: Round) -> Aims:
        """Raise the rank margin from each aim, and show the results: the aims from where they ended."""
        ended = []
        for part in torch.split(torch.arange(len(aims), device=aims.index.device), _together(self.problem.x)):
            some = aims.take(part)
            objective = self.aimed(some, planned)
            images, _, scores = ascent.ascend(
                self.problem.take(some.index),
                self.accepted(objective),
                some.points,
                steps=self.part_of_steps(planned.steps),
                stride=planned.stride,
            )
            ended.append(replace(some, points=images, scores=scores))
            self.offer(planned.name, images, some.index)
        self.broken.setdefault(planned.name, 0)
        return Aims.together(ended) if ended else aims

    def accepted(self, objective: Objective, combine: Combine = selective) -> Objective:
        """The objective, whose images must be accepted where any are rejected."""
        surface = self.problem.surface
        return objective if surface.rejection is None else Accepted(surface, objective, combine)

    def aimed(self, some: Aims, planned: Round) -> Objective:
        """What is raised from aims: the decisive neighbour's margin, or of a smooth defence the answer's own."""
        surface = self.problem.surface
        if surface.smooth:
            return AnswerMargin(surface, target=some.target, hot=planned.hot, cold=planned.hot / 10)
        return RankMargin(surface, target=some.target, gap=some.gap, hot=planned.hot, cold=planned.cold)

    def ascend(
        self, name: str, objective: Objective, begin: Tensor, share: float, combine: Combine = selective
    ) -> None:
        """Raise an objective on what stands, from some of N images, and show the results."""
        self.broken.setdefault(name, 0)
        index = self.left()
        if len(index):
            steps, objective = self.part_of_steps(share), self.accepted(objective, combine)
            images, _, _ = ascent.ascend(self.problem.take(index), objective, begin[index], steps=steps)
            self.offer(name, images, index)

    def part_of_steps(self, share: float) -> int:
        """A share of the attack's steps, at least one."""
        return max(round(share * self.steps), 1)


@torch.no_grad()
def _judged(surface: RetrievalSurface, images: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Margins N of the true pipeline and whether it is fooled, N; with a rejection as :class:`AdaptiveResult` says."""
    log_p = surface.predict(images).to(images.device)
    margins, fooled = margin(log_p, y), log_p.argmax(1) != y
    if surface.rejection is None:
        return margins, fooled
    accepted = surface.rejection.accepts(images).to(y.device)
    return torch.minimum(margins, -surface.rejection.excess(images).to(margins)), fooled & accepted


def _together(x: Tensor) -> int:
    """How many copies of images are raised at a time: as many as a batch, and more where they are small."""
    return max(len(x), min(2048, _NUMBERS // max(x[:1].numel(), 1)))
