"""The quadratic programmes that the batched ascent leaves undecided, by Clarabel (Goulart and Chen 2024)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nndefense.attacks.retrieval.polyhedra import Planes, Region, Settled, settle

# Rows outside that a programme begins with, and how often it is given those that it violates.
_ROWS, _ROUNDS = 128, 10


def decide(planes: Planes, region: Region, inside: Tensor, outside: Tensor, slack: float) -> Settled:
    """As :func:`~nndefense.attacks.retrieval.polyhedra.settle`, with a solver for what that has not decided."""
    found = settle(planes, region, inside, outside, slack)
    for place in (~found.empty & ~found.met).nonzero()[:, 0]:
        one = _solve(planes, region.take(place[None]), inside[place], outside[place], slack)
        for whole, part in zip(vars(found).values(), vars(one).values(), strict=True):
            whole[place] = part[0]
    return found


def _solve(planes: Planes, region: Region, inside: Tensor, outside: Tensor, slack: float) -> Settled:
    """One polyhedron; the solver's own word counts for nothing: its multipliers give D, and its point is checked."""
    import clarabel
    from scipy import sparse

    center, low, high = (part[0].numpy() for part in (region.center, region.low, region.high))
    limit, d = float(region.limit[0]), len(center)
    settings = clarabel.DefaultSettings()
    settings.verbose, settings.max_threads = False, 1
    quadratic = sparse.identity(d, format="csc")
    point, far = region.center, outside.nonzero()[:, 0]
    support = torch.zeros_like(outside)
    chosen = far[planes.at(point)[0, far].argsort()[:_ROWS]]
    inside = torch.tensor(sorted(set(inside.tolist())))
    for _ in range(_ROUNDS):
        pairs = torch.cartesian_prod(inside, chosen)
        normal = planes.slope[pairs[:, 0]] - planes.slope[pairs[:, 1]]
        size = normal.norm(dim=1)
        # Rows that are equal are as near from everywhere: nothing that a solver could work with.
        apart = size > 1e-9
        pairs, normal, size = pairs[apart], normal[apart], size[apart]
        bounds = ((planes.level[pairs[:, 1]] - planes.level[pairs[:, 0]] + slack) / size).numpy()
        normals = (normal / size[:, None]).numpy()
        matrix = sparse.vstack([sparse.csc_matrix(normals), sparse.identity(d), -sparse.identity(d)], format="csc")
        offsets = np.concatenate([bounds, high, -low])
        cones = [clarabel.NonnegativeConeT(len(offsets))]
        answer = clarabel.DefaultSolver(quadratic, -center, matrix, offsets, cones, settings).solve()
        weights = np.maximum(np.asarray(answer.z)[: len(bounds)], 0)
        # The multipliers of a programme without a solution prove that on any scale that is large enough.
        for scale in (1.0, 1e2, 1e4, 1e6):
            moved = np.clip(center - scale * weights @ normals, low, high)
            value = np.square(moved - center).sum() / 2 + scale * weights @ (normals @ moved - bounds)
            if value > limit:
                support[pairs[torch.from_numpy(weights > 0), 1]] = True
                return Settled(_bits(True), _bits(False), point, support[None])
        point = torch.from_numpy(np.clip(np.asarray(answer.x), low, high))[None]
        if not bool(torch.isfinite(point).all()):
            break
        values = planes.at(point)[0]
        over = values[inside].max() - values[far]
        within = bool((point - region.center).square().sum() / 2 <= region.limit[0])
        if float(over.max()) <= slack + abs(slack) / 4:
            return Settled(_bits(False), _bits(within), point, support[None])
        more = far[over > slack]
        more = more[~torch.isin(more, chosen)]
        if not len(more):
            break
        chosen = torch.cat([chosen, more[:_ROWS]])
    return Settled(_bits(False), _bits(False), region.center, support[None])


def _bits(value: bool) -> Tensor:
    return torch.tensor([value])
