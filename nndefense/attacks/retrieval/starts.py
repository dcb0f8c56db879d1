"""Where attacks begin and what they aim at: rows of other classes, ranked by how near the ball comes to them."""

from __future__ import annotations

import torch
from torch import Tensor

from nndefense.attacks import norms
from nndefense.attacks.retrieval.ascent import Problem

_CHUNK = 2048


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
