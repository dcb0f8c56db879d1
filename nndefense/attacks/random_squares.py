"""Square: a score-based attack by random squares, without gradients (Andriushchenko et al., ECCV 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nndefense.attacks import losses, norms
from nndefense.attacks.checks import at_least, checked_inputs, fraction
from nndefense.attacks.door import any_type
from nndefense.attacks.losses import Model, checked_logits
from nndefense.memory import reusing_memory

# Section 4.1: after these numbers of queries, of 10,000, the share of pixels is halved.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@any_type
@torch.no_grad()
@reusing_memory
def square(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    queries: int = 5000,
    p_init: float = 0.8,
    targeted: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Square attack (Andriushchenko et al., ECCV 2020, Algorithms 1 to 3): random search, counted in queries.

    Each query changes one square window of every image, to a corner of the ball (linf) or to a pyramid that takes
    over the length of another window (l2), and keeps the change where the margin between the best wrong class and
    the label rises. No gradient is asked for, so it also attacks what has none. As in the authors' code a window is
    shared by the batch. An image leaves the batch as soon as it fools the model.

    ``model``, ``x``, ``y``, ``eps``, ``norm``, ``targeted``, ``generator`` and the errors are as for
    :func:`nndefense.attacks.pgd`; towards a class, the margin of that class over the best other one is raised.

    Args:
        queries: forward passes per image, at least 1; the first looks at the clean image.
        p_init: share of the pixels in the first window, in (0, 1].

    Returns:
        The attacked images: same shape, dtype and device as ``x``, in [0, 1] and inside the ball; the clean image
        where it is already misclassified, or said to be what the attack aims at.
    """
    radii = checked_inputs(model, x, y, eps, norm)
    at_least("queries", queries)
    fraction("p_init", p_init)
    x = x.detach()
    best = x.clone()
    objective = losses.negated(losses.margin) if targeted else losses.margin
    margin = objective(checked_logits(model, x, y), y)
    dice = _Dice(x, generator)
    for query in range(1, queries):
        here = (margin <= 0).nonzero()[:, 0]
        if len(here) == 0:
            break
        clean, now, radius = x[here], best[here], radii[here]
        if query == 1:
            tried = (_stripes if norm == "linf" else _tiles)(clean, radius, dice)
        else:
            share = p_init / 2 ** sum(10_000 * (query - 2) / queries > limit for limit in _HALVINGS)
            tried = (_corners if norm == "linf" else _pyramid)(clean, now, radius, share, dice)
        tried = norms.projector(clean, radius, norm)(tried)
        reached = objective(model(tried), y[here])
        # The first proposal is the start of the search, better or not than the clean image.
        better = (reached > margin[here]) | (query == 1)
        best[here[better]], margin[here[better]] = tried[better], reached[better]
    return best


class _Dice:
    """Random numbers from one generator, on the images' device."""

    def __init__(self, like: Tensor, generator: torch.Generator | None) -> None:
        self.like, self.generator = like, generator
        self.device = like.device if generator is None else generator.device

    def signs(self, *shape: int) -> Tensor:
        """-1 or 1, each with probability 1/2."""
        drawn = torch.randint(0, 2, shape, generator=self.generator, device=self.device)
        return (2 * drawn - 1).to(self.like)

    def below(self, limit: int) -> int:
        """A whole number of 0..limit-1."""
        return int(torch.randint(0, limit, (), generator=self.generator, device=self.device))

    def window(self, side: int) -> tuple[slice, slice]:
        """Rows and columns of a square inside the image."""
        height, width = self.like.shape[-2:]
        top, left = self.below(height - side + 1), self.below(width - side + 1)
        return slice(top, top + side), slice(left, left + side)


def _side(x: Tensor, share: float, least: int = 1) -> int:
    """The side of a square that covers this share of the image."""
    height, width = x.shape[-2:]
    return min(max(round(math.sqrt(share * height * width)), least), height, width)


def _stripes(x: Tensor, radii: Tensor, dice: _Dice) -> Tensor:
    """The linf start: vertical stripes of width 1 at the corners of the ball."""
    count, channels, _, width = x.shape
    return x + norms.per_image(radii, x) * dice.signs(count, channels, 1, width)


def _corners(x: Tensor, now: Tensor, radii: Tensor, share: float, dice: _Dice) -> Tensor:
    """The linf step: one window goes to a corner of the ball, with one sign per image and channel."""
    rows, columns = dice.window(_side(x, share))
    tried = now.clone()
    # Twice the radius, and the projection after it: what stands at the other corner crosses over.
    change = 2 * norms.per_image(radii, x) * dice.signs(*x.shape[:2], 1, 1)
    tried[..., rows, columns] = now[..., rows, columns] + change
    return tried


def _tiles(x: Tensor, radii: Tensor, dice: _Dice) -> Tensor:
    """The l2 start: five by five pyramids of random sign."""
    count, channels, height, width = x.shape
    side = max(min(height, width) // 5, 1)
    delta = torch.zeros_like(x)
    for top in range((height % side) // 2, height - side + 1, side):
        for left in range((width % side) // 2, width - side + 1, side):
            bump = _bump(side, x, dice)
            delta[..., top : top + side, left : left + side] += bump * dice.signs(count, channels, 1, 1)
    return x + _scaled(delta, radii)


def _pyramid(x: Tensor, now: Tensor, radii: Tensor, share: float, dice: _Dice) -> Tensor:
    """The l2 step (Algorithm 3): a window gets a pyramid, and the length that a second window gives up."""
    height, width = x.shape[-2:]
    side = _side(x, share, least=3)
    side += (side % 2 == 0) if side < min(height, width) else 0
    to, source = dice.window(side), dice.window(side)
    delta = now - x
    windows = torch.zeros(height, width, dtype=torch.bool, device=x.device)
    windows[to], windows[source] = True, True
    freed = norms.length(delta * windows) ** 2
    unused = (radii**2 - norms.length(delta) ** 2).clamp_min(0)
    old = delta[..., to[0], to[1]]
    old = old / old.flatten(2).norm(dim=2)[..., None, None].clamp_min(1e-12)
    fresh = old + _bump(side, x, dice) * dice.signs(*x.shape[:2], 1, 1)
    fresh = fresh / fresh.flatten(2).norm(dim=2)[..., None, None].clamp_min(1e-12)
    delta[..., source[0], source[1]] = 0
    delta[..., to[0], to[1]] = fresh * norms.per_image(((unused + freed) / x.shape[1]).sqrt(), x)
    return x + _scaled(delta, radii)


def _bump(side: int, like: Tensor, dice: _Dice) -> Tensor:
    """Two pyramids side by side, one up and one down, of length 1: side x side (section 4.2)."""
    bump = torch.zeros(side, side, dtype=like.dtype, device=like.device)
    bump[: side // 2] = _half(side // 2, side, like)
    bump[side // 2 :] = -_half(side - side // 2, side, like)
    bump /= torch.linalg.vector_norm(bump).clamp_min(1e-12)
    return bump.t() if dice.below(2) else bump


def _half(rows: int, columns: int, like: Tensor) -> Tensor:
    """Rectangles around the middle, the r-th one adding 1 / r^2: rows x columns."""
    half = torch.zeros(rows, columns, dtype=like.dtype, device=like.device)
    top, left = rows // 2, columns // 2
    for r in range(max(rows, columns) // 2 + 1):
        half[max(top - r, 0) : top + r + 1, max(left - r, 0) : left + r + 1] += 1 / (r + 1) ** 2
    return half


def _scaled(delta: Tensor, radii: Tensor) -> Tensor:
    """The perturbation brought to the length of the radius."""
    return delta * norms.per_image(radii / norms.length(delta).clamp_min(1e-12), delta)
