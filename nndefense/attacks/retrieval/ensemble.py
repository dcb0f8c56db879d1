"""The adaptive attack: several attacks on retrieval, one after another, on the images that still stand."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nndefense.attacks import norms
from nndefense.attacks.checks import at_least
from nndefense.attacks.losses import margin
from nndefense.attacks.retrieval import ascent, objectives
from nndefense.attacks.retrieval.ascent import BATCH, Objective, Problem
from nndefense.attacks.retrieval.objectives import ClassifierLoss, ClassScores, Drift, PushPull, SoftTopK
from nndefense.attacks.retrieval.surface import Counts, RetrievalSurface
from nndefense.errors import InputError
from nndefense.memory import reusing_memory

# Strong and cheap stages first: what they break costs no further step.
PLAN = ("soft", "soft-start-1", "soft-start-2", "straight-through", "push-pull", "soft-target-1", "gray")
# Everything there is. On 100 MNIST images the rest broke nothing that these had left, at three times their cost.
FULL_PLAN = (
    *PLAN[:-1], "soft-start-3", "soft-target-2", "soft-hot", "soft-dlr", "soft-random", "ask", "pgd-fs", "pgd-pr",
    "drift", "gray",
)  # fmt: skip
# What a restart adds: the objective that breaks most, and the one that ignores the rows, each from a random start.
AGAIN = ("soft-random", "gray")
_CHUNK = 2048


@dataclass(frozen=True)
class AdaptiveResult:
    """What the adaptive attack found.

    Attributes:
        images: N x C x H x W: the first image that the true pipeline misclassified, else the one on which the margin
            of the true pipeline's log-probabilities was smallest.
        fooled: N, by the true pipeline, from one last prediction of ``images``.
        margins: N, ``max_{c != y} log p_c - log p_y`` of the true pipeline on ``images``.
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
    """The attacked images of :func:`run_adaptive`; see there."""
    return run_adaptive(surface, x, y, eps=eps, **settings).images


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
    plan: Sequence[str] = PLAN,
    restarts: int = 1,
    start: Tensor | None = None,
    batch_size: int = BATCH,
) -> AdaptiveResult:
    """Attack with everything that the attacker's knowledge allows, and let the true pipeline judge each image.

    The worst case per image over: the clean image; ``start``, where it is given; the points of the ball nearest to
    other classes' rows; and every stage of the plan. Stages run on images that still stand. Those that need what the
    surface does not have are left out: at L0 only ``gray`` is left, at L1 without rows also ``drift``.

    Args:
        surface, x, y, eps, norm, generator, batch_size: as for :func:`~nndefense.attacks.retrieval.ascent.attack`.
        steps: gradient steps of each stage.
        plan: names out of :data:`FULL_PLAN`, in the order in which they are to run.
        restarts: at least 1; each more adds the stages of :data:`AGAIN`, from new random starts.
        start: images of another attack inside the ball, such as the gray-box attack's: this one is then never weaker.

    Raises:
        InputError: images, labels or settings that cannot be used, or an unknown stage.
    """
    begun = time.perf_counter()
    problem = ascent.pose(surface, x, y, eps, norm, steps=steps)
    at_least("restarts", restarts)
    plan = (*plan, *AGAIN * (restarts - 1))
    unknown = [name for name in plan if name not in _STAGES]
    if unknown or batch_size < 1:
        raise InputError(f"the plan names {unknown}, but the stages are {', '.join(FULL_PLAN)}; batches need 1 image")
    before = Counts(**vars(surface.counts))
    best, margins = problem.x.clone(), torch.full_like(problem.radii, -torch.inf)
    stages, broken = [""] * len(x), {"clean": 0}
    for index in torch.split(torch.arange(len(x), device=x.device), batch_size):
        part = problem.take(index)
        run = _Run(part, steps, generator)
        run.offer("clean", part.x)
        if start is not None:
            run.offer("start", part.bring_in(start[index].to(part.x))[run.standing])
        for name in plan:
            if not run.standing.any():
                break
            run.stage(name, _STAGES[name])
        best[index], margins[index] = run.best, run.margins
        for place, name in zip(index.tolist(), run.stages, strict=True):
            stages[place] = name
        for name, number in run.broken.items():
            broken[name] = broken.get(name, 0) + number
    # The last word: one prediction of the final images, in batches like any other user's.
    log_p = torch.cat(
        [problem.surface.predict(part).to(x.device) for part in torch.split(best, batch_size)] or [margins]
    )
    final = margin(log_p, problem.y) if len(x) else margins
    fooled = log_p.argmax(1) != problem.y if len(x) else margins > 0
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
        self._starts: list[Tensor] | None = None
        self._targets: Tensor | None = None

    def offer(self, name: str, images: Tensor, index: Tensor | None = None) -> None:
        """Show images of the standing (or of all, or of ``index``) to the true pipeline; keep what is worse for it."""
        index = self.standing.nonzero()[:, 0] if index is None else index
        self.broken.setdefault(name, 0)
        if not len(index):
            return
        log_p = self.problem.surface.predict(images).to(images.device)
        y = self.problem.y[index]
        margins, fooled = margin(log_p, y), log_p.argmax(1) != y
        better = fooled | (margins > self.margins[index])
        self.best[index[better]], self.margins[index[better]] = images[better], margins[better]
        self.standing[index[fooled]] = False
        self.broken[name] += int(fooled.sum())
        for place in index[fooled].tolist():
            self.stages[place] = name

    def stage(self, name: str, stage: _Stage) -> None:
        """Run a stage on the standing images, unless the surface lacks what it needs."""
        surface, index, target = self.problem.surface, self.standing.nonzero()[:, 0], None
        if any(getattr(surface, need) is None for need in stage.needs):
            return
        begin = self.problem.x
        if stage.random_start:
            begin = self.problem.random_start(self.generator)
        elif stage.near is not None and stage.near < len(self.starts()):
            begin = self.starts()[stage.near]
        elif stage.near is not None and stage.offers:
            return
        if stage.offers:
            self.offer(name, begin[index], index)
            index = self.standing.nonzero()[:, 0]
        if stage.target is not None:
            target = self.targets(stage.target)[index]
        if len(index) == 0:
            return
        if stage.settings.get("loss") == "dlr":
            rows = surface.need_rows("DLR")
            if rows.posteriors(torch.zeros(1, dtype=torch.int64)).shape[1] < 3:
                return
        aim = {} if target is None else {"target": target}
        objective = stage.objective(surface, **aim, **stage.settings)
        images, _ = ascent.ascend(self.problem.take(index), objective, begin[index], steps=self.steps)
        self.offer(name, images, index)

    def starts(self) -> list[Tensor]:
        """Three interpolation starts for every image of the batch; made when the first stage asks."""
        if self._starts is None:
            # Images that fell already keep x: they are not attacked again.
            index = self.standing.nonzero()[:, 0]
            self._starts = []
            for found in interpolations(self.problem.take(index), 3, pool=40):
                whole = self.problem.x.clone()
                whole[index] = found
                self._starts.append(whole)
        return self._starts

    def targets(self, place: int) -> Tensor:
        """The nearest wrong class (0) or the next (1) of every image of the batch."""
        if self._targets is None:
            rows, k = self.problem.surface.need_rows("targets"), self.problem.surface.k
            clean = objectives.clean_features(self.problem)
            self._targets = objectives.wrong_classes(rows, clean, self.problem.y, 2, max(k // 2, 1))
        return self._targets[:, min(place, self._targets.shape[1] - 1)]


@torch.no_grad()
def interpolations(problem: Problem, count: int, *, pool: int | None = None) -> list[Tensor]:
    """Starts on the way to rows of other classes, best first.

    Each of the ``pool`` nearest rows that are not predicted as y is brought into the ball around x: for l_2 the point
    of the segment from x, for l_inf the clipped difference; where the radius reaches the row's image, that image.
    They are ranked by how much nearer such a point lies to its row than to the rows of y: the nearest row by feature
    distance is often not the one that the ball comes nearest to.

    Args:
        problem: with rows that have images.
        count: how many starts, at least 1.
        pool: how many rows are ranked; default 8 for each start; ``count`` takes the nearest in their own order.

    Returns:
        At most ``count`` batches N x C x H x W, empty where the rows have no images.
    """
    surface = problem.surface
    rows, features = surface.need_rows("interpolation"), surface.need_features("interpolation")
    if rows.images is None or not len(problem.x):
        return []
    pool = min(8 * count if pool is None else max(pool, count), rows.count)
    count = min(count, pool)
    clean = features(problem.x)
    distances, found = rows.nearest(clean, pool, but=problem.y)  # N x pool
    # A row whose place is not filled is replaced by the nearest one.
    found = torch.where(torch.isfinite(distances), found, found[:, :1])
    n = len(problem.x)
    goals = rows.images(found.flatten()).to(problem.x).view(n, pool, *problem.x.shape[1:])
    points = (problem.x.unsqueeze(1) + _into_ball(goals - problem.x.unsqueeze(1), problem)).clamp_(0, 1)
    if pool > count:
        flat = points.flatten(0, 1)
        moved = torch.cat([features(part) for part in torch.split(flat, _CHUNK)]).view(n, pool, -1)
        _, own = rows.nearest(clean, min(surface.k + 32, rows.count), of=problem.y)
        # The row of y that has to be farther than the goal for the goal's class to have the majority of K.
        rank = min((surface.k + 1) // 2, own.shape[1])
        to_own = torch.cdist(moved, rows.vectors(own)).kthvalue(rank, dim=2).values
        to_goal = (moved - rows.vectors(found)).norm(dim=2)
        order = (to_own - to_goal).argsort(dim=1, descending=True, stable=True)[:, :count]
        points = points.gather(1, order.view(n, count, 1, 1, 1).expand(-1, -1, *points.shape[2:]))
    return list(points.unbind(1))


def _into_ball(deltas: Tensor, problem: Problem) -> Tensor:
    """Project N x P x C x H x W differences into each image's ball."""
    radii = problem.radii.repeat_interleave(deltas.shape[1])
    return norms.project(deltas.flatten(0, 1), radii, problem.norm).view_as(deltas)


@dataclass(frozen=True)
class _Stage:
    """An objective with its settings, where it begins (x by default), and which wrong class it aims at."""

    objective: Callable[..., Objective]
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ("rows",)
    random_start: bool = False
    near: int | None = None  # begins at this interpolation
    offers: bool = False  # shows its start to the pipeline, too
    target: int | None = None


_PAPER = ("rows", "classify")
_STAGES = {
    "soft": _Stage(SoftTopK),
    **{f"soft-start-{n}": _Stage(SoftTopK, near=n - 1, offers=True) for n in (1, 2, 3)},
    **{f"soft-target-{n}": _Stage(SoftTopK, target=n - 1) for n in (1, 2)},
    "soft-hot": _Stage(SoftTopK, {"hot": 3.0, "cold": 0.3}),
    "soft-dlr": _Stage(SoftTopK, {"loss": "dlr"}),
    "soft-random": _Stage(SoftTopK, random_start=True),
    "straight-through": _Stage(SoftTopK, {"hard": True}),
    "push-pull": _Stage(PushPull, near=0),
    "ask": _Stage(ClassScores, random_start=True),
    "drift": _Stage(Drift, needs=("features",), random_start=True),
    "pgd-pr": _Stage(ClassifierLoss, {"term": "prediction"}, _PAPER, random_start=True),
    "pgd-fs": _Stage(ClassifierLoss, {"term": "feature"}, _PAPER, random_start=True),
    "gray": _Stage(ClassifierLoss, needs=("classify",), random_start=True),
}
