"""Where attacks on retrieval begin: images of the rows of each class, brought into ball and box, and ranked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nndefense.attacks import norms
from nndefense.attacks.retrieval import objectives, ranks
from nndefense.attacks.retrieval.ascent import Problem

# Numbers in the images that are looked at together: what bounds the memory.
_TOGETHER = 1 << 24


@dataclass(frozen=True)
class Aims:
    """M beginnings of an attack, of the images of a problem.

    Attributes:
        index: M, the image of the problem that each belongs to.
        target: M classes to aim at; the image's own class stands for any other.
        points: M x C x H x W, inside ball and box.
        scores: M, the margin of :mod:`~nndefense.attacks.retrieval.ranks` there.
        gap: M, that of the clean image without its sign.
    """

    index: Tensor
    target: Tensor
    points: Tensor
    scores: Tensor
    gap: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def take(self, which: Tensor) -> Aims:
        """Some of them."""
        return Aims(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    def best(self, count: int, among: Tensor) -> Aims:
        """The ``count`` of highest score of each image for which ``among`` (one truth value an image) holds."""
        order = self.scores.argsort(descending=True, stable=True)
        order = order[self.index[order].argsort(stable=True)]
        index = self.index[order]
        place = torch.arange(len(order), device=order.device)
        first = torch.searchsorted(index, index)
        return self.take(order[(place - first < count) & among[index]])

    @classmethod
    def together(cls, parts: list[Aims]) -> Aims:
        """Several lists as one."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


@torch.no_grad()
def from_rows(problem: Problem, index: Tensor, *, classes: int, pool: int, keep: int) -> Aims:
    """For each image and each wrong class the best beginnings among its rows.

    The ``pool`` nearest rows of the class are brought into ball and box around x, and ranked with x itself by the true
    margin: the nearest row by feature distance is often not the one that the ball comes nearest to. Where rows have no
    images, x is the only beginning.

    Args:
        problem: with rows.
        index: M images of it.
        classes: nearest wrong classes that are aimed at, besides "any but y".
        pool: rows tried for each class.
        keep: beginnings kept for each.
    """
    rows, part = problem.surface.need_rows("a start"), problem.take(index)
    clean = part.clean_features()
    wrong = objectives.wrong_classes(rows, clean, part.y, classes, max(problem.surface.k // 2, 1))
    found = []
    for column, target in enumerate([*wrong.unbind(1), part.y]):
        # Fewer classes than there are places repeat one of them.
        fresh = ~(wrong[:, :column] == target.unsqueeze(1)).any(1)
        begin = Aims(index, target, part.x, torch.zeros_like(part.radii), torch.zeros_like(part.radii)).take(fresh)
        found += [_ranked(problem, piece, _goal, pool=pool, keep=keep, clean=True) for piece in _pieces(begin, pool)]
    return Aims.together(found)


@torch.no_grad()
def relinked(problem: Problem, aims: Aims, generator: torch.Generator | None, *, pool: int, keep: int) -> Aims:
    """Beginnings on the paths from good points to the rows that lie around them now, with noise (path relinking).

    Args:
        problem: with rows; without their images the aims are returned as they are.
        aims: good points, each of which gives ``keep`` new ones.
        generator: source of the share of the way, 0.2 to 0.8, and of the noise, a tenth of the radius at most.
        pool: rows around each point that are tried.
        keep: how many of them are kept, by the true margin.
    """
    if problem.surface.need_rows("a start").images is None or not len(aims):
        return aims

    def mix(piece: Aims) -> Callable[[Tensor, Tensor], Tensor]:
        radii = 0.1 * problem.radii[piece.index]

        def mixed(points: Tensor, goals: Tensor) -> Tensor:
            share = 0.2 + 0.6 * norms.drawn(points[:, :1, :1, :1], generator, torch.rand)
            return torch.lerp(points, goals, share) + norms.random_in_ball(points, radii, problem.norm, generator)

        return mixed

    pieces = _pieces(aims, pool)
    return Aims.together([_ranked(problem, piece, mix(piece), pool=pool, keep=keep) for piece in pieces])


def _pieces(aims: Aims, pool: int) -> list[Aims]:
    size = max(_TOGETHER // ((pool + 1) * max(aims.points[:1].numel(), 1)), 1)
    every = torch.arange(len(aims), device=aims.index.device)
    return [aims.take(part) for part in torch.split(every, size) if len(part)]


def _ranked(
    problem: Problem,
    aims: Aims,
    mix: Callable[[Tensor, Tensor], Tensor],
    *,
    pool: int,
    keep: int,
    clean: bool = False,
) -> Aims:
    """The best mixes of each point with its ``pool`` rows' images; ``clean`` points are x: ranked too, and a scale."""
    rows, features = problem.surface.need_rows("a start"), problem.surface.need_features("a start")
    own, k = problem.take(aims.index), problem.surface.k
    here = features(aims.points)
    hood, near = ranks.sides(rows, here, aims.target, k, around=pool)
    half = near.shape[1] // 2
    # The rows that are to come nearer: of the class, or, where it is y itself, of any other.
    goals = torch.where((aims.target == own.y).unsqueeze(1), near[:, half:], near[:, :half])[:, :pool]

    def score(points: Tensor, vectors: Tensor) -> Tensor:
        if problem.surface.smooth:
            return ranks.answer_margins(problem.surface, hood, points, vectors, aims.target, own.y)
        return ranks.margins(hood, hood.distances(vectors), aims.target, own.y, k)[0]

    points, scores = ([aims.points], [score(aims.points, here)]) if clean else ([], [])
    gap = scores[0].abs() if clean else aims.gap
    if rows.images is not None:
        for column in goals.unbind(1):
            points.append(own.bring_in(mix(aims.points, rows.images(column).to(own.x))))
            scores.append(score(points[-1], features(points[-1])))
    ranked, order = torch.stack(scores).topk(min(keep, len(scores)), dim=0)
    best = torch.stack(points)[order, torch.arange(len(aims), device=order.device)]
    index, target, scale = (part.repeat(len(order)) for part in (aims.index, aims.target, gap))
    return Aims(index, target, best.flatten(0, 1), ranked.flatten(), scale)


def _goal(points: Tensor, goals: Tensor) -> Tensor:
    return goals
