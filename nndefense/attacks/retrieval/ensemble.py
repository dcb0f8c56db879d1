"""The adaptive attack: several attacks on retrieval, one after another, on the images that still stand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nndefense.attacks.losses import margin
from nndefense.attacks.retrieval import ascent, objectives, starts
from nndefense.attacks.retrieval.ascent import Problem
from nndefense.attacks.retrieval.fixed import BATCH
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


def adaptive(
    surface: RetrievalSurface,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 100,
    generator: torch.Generator | None = None,
    plan: Sequence[str] = PLAN,
    start: Tensor | None = None,
    batch_size: int = BATCH,
) -> Tensor:
    """The attacked images of :func:`run_adaptive`; see there."""
    return run_adaptive(
        surface, x, y, eps=eps, norm=norm, steps=steps, generator=generator, plan=plan, start=start,
        batch_size=batch_size,
    ).images  # fmt: skip


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
    start: Tensor | None = None,
    batch_size: int = BATCH,
) -> AdaptiveResult:
    """Attack with everything that the attacker's knowledge allows, and let the true pipeline judge each image.

    The worst case per image over: the clean image; ``start``, where it is given; the points of the ball nearest to
    other classes' rows; and every stage of the plan. Stages run on images that still stand. Those that need what the
    surface does not have are left out: at L0 only ``gray`` is left, at L1 without rows also ``drift``.

    Args:
        surface: at any level.
        x: clean images, N x C x H x W in [0, 1].
        y: class numbers N.
        eps: radius, one number or one per image; in units of ``norm``.
        norm: ``linf``, ``l2`` or ``normalized-l2``.
        steps: gradient steps of each stage.
        generator: source of random starts.
        plan: names out of :data:`FULL_PLAN`, in the order in which they are to run.
        start: images of another attack inside the ball, such as the gray-box attack's: this one is then never weaker.
        batch_size: images attacked at a time, which bounds the memory.

    Raises:
        InputError: images, labels or settings that cannot be used, or an unknown stage.
    """
    begun = time.perf_counter()
    problem = ascent.pose(surface, x, y, eps, norm, steps=steps)
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
            needs, stage = _STAGES[name]
            if not run.standing.any():
                break
            if all(getattr(surface, need) is not None for need in needs):
                stage(run, name)
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

    def ascend(
        self, name: str, objective: ascent.Objective, start: Tensor | None = None, use_features: bool = True
    ) -> None:
        """Run an objective on the standing images from x or from ``start`` (given for all images)."""
        index = self.standing.nonzero()[:, 0]
        part = self.problem.take(index)
        begin = part.x if start is None else start[index]
        images, _ = ascent.ascend(part, objective, begin, steps=self.steps, use_features=use_features)
        self.offer(name, images, index)

    def starts(self) -> list[Tensor]:
        """Three interpolation starts for every image of the batch; made when the first stage asks."""
        if self._starts is None:
            # Images that fell already keep x: they are not attacked again.
            index = self.standing.nonzero()[:, 0]
            self._starts = []
            for found in starts.interpolations(self.problem.take(index), 3, pool=40):
                whole = self.problem.x.clone()
                whole[index] = found
                self._starts.append(whole)
        return self._starts

    def targets(self, place: int) -> Tensor:
        """The nearest wrong class (0) or the next (1) of every image of the batch."""
        if self._targets is None:
            surface = self.problem.surface
            with torch.no_grad():
                clean = surface.need_features("targets")(self.problem.x)
            rows = surface.need_rows("targets")
            self._targets = objectives.wrong_classes(rows, clean, self.problem.y, 2, max(surface.k // 2, 1))
        return self._targets[:, min(place, self._targets.shape[1] - 1)]


Stage = Callable[[_Run, str], None]


def _soft(loss: str = "margin", hard: bool = False, hot: float = 0.3, cold: float = 0.03) -> Stage:
    def stage(run: _Run, name: str) -> None:
        surface = run.problem.surface
        rows, begin, target = surface.need_rows(name), None, None
        index = run.standing.nonzero()[:, 0]
        if name.startswith("soft-start"):
            found = run.starts()
            place = int(name[-1]) - 1
            if place >= len(found):
                return
            begin = found[place]
            run.offer(name, begin[index], index)
            index = run.standing.nonzero()[:, 0]
        elif name.startswith("soft-target"):
            target = run.targets(int(name[-1]) - 1)[index]
        elif name == "soft-random":
            begin = run.problem.random_start(run.generator)
        if len(index) == 0 or (loss == "dlr" and rows.posteriors(torch.zeros(1, dtype=torch.int64)).shape[1] < 3):
            return
        run.ascend(
            name, objectives.SoftTopK(rows, surface.k, loss=loss, hard=hard, target=target, hot=hot, cold=cold), begin
        )

    return stage


def _push_pull(run: _Run, name: str) -> None:
    surface = run.problem.surface
    found = run.starts()
    guides = min(max(2 * surface.k, 2), 100)
    run.ascend(
        name, objectives.PushPull(surface.need_rows(name), surface.k, guides=guides), found[0] if found else None
    )


def _ask(run: _Run, name: str) -> None:
    begin = run.problem.random_start(run.generator)
    run.ascend(name, objectives.ClassScores(run.problem.surface.need_rows(name)), begin)


def _drift(run: _Run, name: str) -> None:
    run.ascend(name, objectives.Drift(), run.problem.random_start(run.generator))


def _paper(run: _Run, name: str) -> None:
    surface, begin = run.problem.surface, run.problem.random_start(run.generator)
    classify = surface.need_classifier(name)
    if name == "gray":
        run.ascend(name, objectives.ClassifierLoss(classify), begin, use_features=False)
    elif name == "pgd-pr":
        objective = objectives.ClassifierLoss(classify, surface.need_rows(name), term="prediction")
        run.ascend(name, objective, begin, use_features=False)
    else:
        run.ascend(name, objectives.ClassifierLoss(classify, surface.need_rows(name), term="feature"), begin)


_STAGES: dict[str, tuple[tuple[str, ...], Stage]] = {
    "soft": (("rows",), _soft()),
    "soft-start-1": (("rows",), _soft()),
    "soft-start-2": (("rows",), _soft()),
    "soft-start-3": (("rows",), _soft()),
    "soft-target-1": (("rows",), _soft()),
    "soft-target-2": (("rows",), _soft()),
    "soft-hot": (("rows",), _soft(hot=3.0, cold=0.3)),
    "soft-dlr": (("rows",), _soft(loss="dlr")),
    "soft-random": (("rows",), _soft()),
    "straight-through": (("rows",), _soft(hard=True)),
    "push-pull": (("rows",), _push_pull),
    "ask": (("rows",), _ask),
    "drift": (("features",), _drift),
    "pgd-pr": (("rows", "classify"), _paper),
    "pgd-fs": (("rows", "classify"), _paper),
    "gray": (("classify",), _paper),
}
