"""The least l_2 change that fools a retrieval defence (Sitawarin & Wagner, arXiv 2003.06559)."""

from __future__ import annotations

import torch
from torch import Tensor

from nndefense.attacks import norms
from nndefense.attacks.door import wide_types
from nndefense.attacks.losses import gradient_to
from nndefense.attacks.retrieval import ascent, objectives
from nndefense.attacks.retrieval.relaxation import Neighborhood, hard_log_probabilities
from nndefense.attacks.retrieval.surface import RetrievalSurface, Rows
from nndefense.errors import InputError


@wide_types
def push_pull_minimum(
    surface: RetrievalSurface,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 200,
    searches: int = 6,
    guides: int | None = None,
    refresh: int = 20,
    learning_rate: float = 0.02,
    constant: float = 1.0,
    box: bool = True,
    targets: int = 2,
    bisections: int = 12,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Minimise ``||x' - x||_2^2 + c * sum_i ReLU(a_i (d_i^2 - tau) + 1e-5)`` and search for the smallest c that works.

    Of m/2 rows of a wrong class (a = 1) and m/2 of the true class (a = -1), fewer are active after each success, down
    to (K+1)/2. c grows tenfold until it first works and falls tenfold until it first fails, then is bisected. Images
    of rows that the true pipeline gives another class are candidates from the start, so that
    the result is never longer than the way to the best of them. Every candidate's segment from x is bisected, and
    nothing is reported that the true pipeline does not misclassify.

    Other than in the authors' code pixels are changed directly and clipped, not through a tanh, which has no gradient
    at the black pixels of which most digits consist; and third classes' rows count in the check of success.

    Args:
        surface: L1 with rows, L2 or L3.
        x: clean images, N x C x H x W in [0, 1].
        y: class numbers N.
        steps: RMSprop steps for each c.
        searches: values of c.
        guides: m, default 2K, at least 2 and at most 100.
        refresh: steps between two searches for guides.
        learning_rate: first step per pixel; it falls linearly to a twentieth.
        constant: the first c.
        box: keep images in [0, 1]; without it only the defence's own checks bound them.
        targets: wrong classes tried, nearest first.
        bisections: halvings of each segment.
        generator: source of the small noise that each run starts from.

    Returns:
        N x C x H x W: the nearest misclassified images found; x itself where it is misclassified already, and where
        nothing was found (then the true pipeline is right on it).

    Raises:
        InputError: images, labels or settings that cannot be used, or a surface without rows.
    """
    if searches < 1 or targets < 1 or refresh < 1 or not learning_rate > 0 or not constant > 0:
        raise InputError("searches, targets, refresh, learning_rate and constant must be above 0")
    problem = ascent.pose(surface, x, y, 0.0, "l2", steps=steps)
    surface, x, y = problem.surface, problem.x, problem.y
    rows = surface.need_rows("push-pull")
    best = _Best(surface, x, y, bisections)
    if not len(x):
        return best.images
    best.offer(x)
    clean = problem.clean_features()
    wrong = objectives.wrong_classes(rows, clean, y, targets, max(surface.k // 2, 1))
    _offer_rows(best, rows, clean, y)
    half = min(objectives.half_of_guides(guides, surface.k), rows.count)
    for target in wrong.unbind(1):
        c = torch.full_like(y, constant, dtype=x.dtype)
        low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
        successes = torch.zeros_like(c)
        for _ in range(searches):
            # From half guides towards (K+1)/2 as successes come in.
            active = half + ((surface.k + 1) / 2 - half) * (successes / searches)
            found, hit = _descend(
                surface, rows, x, y, target, c, active.round().clamp_min(1), half,
                steps=steps, refresh=refresh, learning_rate=learning_rate, box=box, generator=generator,
            )  # fmt: skip
            hit = best.offer(found) & hit
            successes = successes + hit
            high, low = torch.where(hit, torch.minimum(high, c), high), torch.where(hit, low, torch.maximum(low, c))
            middle = (low + high) / 2
            c = torch.where(torch.isinf(high), c * 10, torch.where(low == 0, c / 10, middle))
    return best.images


class _Best:
    """The nearest misclassified image that was found for each x."""

    def __init__(self, surface: RetrievalSurface, x: Tensor, y: Tensor, bisections: int) -> None:
        self.surface, self.x, self.y, self.bisections = surface, x, y, bisections
        self.images, self.lengths = x.clone(), torch.full_like(x.flatten(1)[:, 0], torch.inf)

    def offer(self, images: Tensor) -> Tensor:
        """Bisect the segment from x to each image that fools the pipeline, and keep what is nearer: N, who fools it."""
        fooled = self.surface.fooled(images, self.y)
        index = (fooled & (norms.length(images - self.x) > 0)).nonzero()[:, 0]
        self._keep(images, fooled)
        low, high = torch.zeros_like(self.lengths[index]), torch.ones_like(self.lengths[index])
        start, end, truth = self.x[index], images[index], self.y[index]
        # The segment need not be misclassified beyond its first flip; the bisection keeps to points that are.
        for _ in range(self.bisections if len(index) else 0):
            middle = (low + high) / 2
            hit = self.surface.fooled(torch.lerp(start, end, norms.per_image(middle, start)), truth)
            high, low = torch.where(hit, middle, high), torch.where(hit, low, middle)
        if len(index):
            nearest = images.clone()
            nearest[index] = torch.lerp(start, end, norms.per_image(high, start))
            # Once more, since rounding of the last blend could tell.
            self._keep(nearest, self.surface.fooled(nearest, self.y))
        return fooled

    def _keep(self, images: Tensor, fooled: Tensor) -> None:
        lengths = norms.length(images - self.x)
        better = fooled & (lengths < self.lengths)
        self.images[better], self.lengths[better] = images[better], lengths[better]


@torch.no_grad()
def _offer_rows(best: _Best, rows: Rows, clean: Tensor, y: Tensor, count: int = 5) -> None:
    """The 1st to 5th nearest rows of other classes, whose images bound the least change from above."""
    if rows.images is None:
        return
    distances, found = rows.nearest(clean, min(count, rows.count), but=y)
    found = torch.where(torch.isfinite(distances), found, found[:, :1])
    for numbers in found.unbind(1):
        best.offer(rows.images(numbers).to(best.x))


def _descend(
    surface: RetrievalSurface,
    rows: Rows,
    x: Tensor,
    y: Tensor,
    target: Tensor,
    c: Tensor,
    active: Tensor,
    half: int,
    *,
    steps: int,
    refresh: int,
    learning_rate: float,
    box: bool,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """One run of RMSprop: the nearest image that the attacker's copy misclassified, else the last; and whether."""
    features = surface.need_features("push-pull")
    noise = norms.drawn(x, generator, torch.randn)
    current, average = _boxed(x + 0.01 * noise, box), torch.zeros_like(x)
    found, least = x.clone(), torch.full_like(c, torch.inf)
    hood: Neighborhood | None = None
    for step in range(steps):
        images = current.detach().requires_grad_(True)
        with torch.enable_grad():
            vectors = features(images)
            if hood is None or step % refresh == 0:
                with torch.no_grad():
                    hood = objectives.guides(rows, vectors.detach(), y, target, half, surface.k)
            distances = hood.distances(vectors)
            squared = (images - x).square().flatten(1).sum(1)
            hinge = objectives.hinge_sum(hood, distances, y, surface.k, active=active, half=half)
            gradient = gradient_to(images, (squared + c * hinge).sum())
        surface.counts.backwards += len(images)
        fooled = hard_log_probabilities(hood, distances.detach(), surface.k).argmax(1) != y
        lengths = squared.detach().sqrt()
        better = fooled & (lengths < least)
        found[better], least[better] = current[better], lengths[better]
        average = 0.9 * average + 0.1 * gradient.square()
        pace = learning_rate * (1 - 0.95 * step / steps)
        current = _boxed(current - pace * gradient / (average.sqrt() + 1e-8), box)
    hit = torch.isfinite(least)
    return torch.where(norms.per_image(hit, x), found, current), hit


def _boxed(images: Tensor, box: bool) -> Tensor:
    return images.clamp(0, 1) if box else images
