"""The geometry of a threat model: radius, steepest step, projection and random start, for each norm.

Norms are taken per image over all d = C*H*W entries. ``normalized-l2`` is the l2 norm with the radius given as a
fraction of the image's own length, ``||x' - x||_2 <= eps * ||x||_2`` (Dubey et al. 2019; Guo et al. 2018), on
pixels in [0, 1] before any normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nndefense.attacks.registry import NORMS
from nndefense.errors import InputError, check_choice, plain, warn

Projector = Callable[[Tensor], Tensor]

_TINY = 1e-12
# Float32 rounding of x + delta can carry an image over the sphere by a few units in the last place.
_SHRINK = 1.0 - 1e-6
# Rounds of the exact projection: pixels stop a few at a time, and seldom in more than four rounds.
_STOPS = 6


def check_eps(eps: float, norm: str) -> None:
    """Raise :class:`InputError` for a radius that cannot be meant: above 1 in linf, as 16 is for 16/255."""
    if norm == "linf" and eps > 1:
        levels = f": for levels of 255 give {eps:g}/255 = {eps / 255:.3g}" if eps <= 255 else ""
        raise InputError(
            f"eps (--eps) is {eps:g} in linf, but must be at most 1, which frees every pixel of [0, 1] already{levels}"
        )


def radius(images: Tensor, eps: float | Tensor, norm: str) -> Tensor:
    """Give each image's radius in raw pixel units.

    Warns where a ball of an l2 norm holds every image there is, since nothing bounds an attack then: for ``l2`` from
    ``sqrt(C * H * W)`` on at the latest.

    Args:
        images: N x C x H x W in [0, 1].
        eps: one number, or one per image (N); in units of the norm.
        norm: one of :data:`nndefense.attacks.NORMS`.

    Returns:
        N radii: per entry for ``linf``, absolute lengths for both l2 norms.

    Raises:
        InputError: an unknown norm; an eps that is negative, not finite, above 1 in linf or not one per image.
    """
    eps = plain(eps)
    found = in_pixels(images, eps, norm)
    several = None if isinstance(eps, (int, float)) else torch.as_tensor(eps)
    largest = float(eps) if several is None else float(several.max()) if several.numel() else 0.0
    check_eps(largest, norm)
    # The farthest corner of the box is at least half its diagonal away, and no image is longer than the diagonal: below
    # that no look at the images is needed, for which a GPU would have to wait.
    least = {"linf": math.inf, "l2": math.sqrt(images.shape[1:].numel()) / 2, "normalized-l2": 0.5}[norm]
    if largest >= least and bool((found >= length(torch.maximum(images, 1 - images))).any()):
        text = f"eps {largest:g} in {norm} is a ball that holds every image of this size: nothing bounds the attack"
        warn(text)
    return found


def in_pixels(images: Tensor, eps: float | Tensor, norm: str) -> Tensor:
    """Give lengths in units of the norm, such as a step's, in raw pixel units: arguments, result and errors as for
    :func:`radius`, but that a length may be as large as it likes.
    """
    check_choice("norm", norm, NORMS)
    # One number is checked as it is: a look at a tensor makes a GPU wait.
    eps = plain(eps)
    valid = 0 <= eps < float("inf") if isinstance(eps, (int, float)) else None
    # In half precision a radius would be another one.
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    eps = torch.as_tensor(eps, dtype=images.dtype, device=images.device)
    if eps.dim() > 1 or (eps.dim() == 1 and len(eps) != len(images)):
        raise InputError(f"eps has shape {tuple(eps.shape)}, but must be one number or one per image ({len(images)})")
    if valid is None:
        valid = bool((torch.isfinite(eps) & (eps >= 0)).all())
    if not valid:
        raise InputError("eps must be finite and at least 0")
    eps = eps.expand(len(images))
    return eps * length(images) if norm == "normalized-l2" else eps


def length(delta: Tensor) -> Tensor:
    """The l2 norm of each image: N x C x H x W -> N."""
    norms: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    return norms


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Shape N numbers so that they broadcast over N x C x H x W."""
    return values.view(-1, *[1] * (like.dim() - 1))


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """The direction of length 1 in which the loss rises fastest: its sign (linf) or its unit vector (l2)."""
    if norm == "linf":
        return gradient.sign()
    # The square of a tiny gradient is 0 in float32, but not in float64 (which MPS does not have).
    exact = None if gradient.device.type == "mps" else torch.float64
    size = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=exact).to(gradient.dtype)
    return gradient / per_image(size.clamp_min(torch.finfo(gradient.dtype).tiny), gradient)


def unit_l1(gradient: Tensor) -> Tensor:
    """The gradient divided by its l1 norm, which MI-FGSM accumulates: N x C x H x W -> N x C x H x W."""
    total = gradient.flatten(1).abs().sum(1).clamp_min(torch.finfo(gradient.dtype).tiny)
    return gradient / per_image(total, gradient)


def project(delta: Tensor, radii: Tensor, norm: str) -> Tensor:
    """Bring each perturbation back into its ball: N x C x H x W and N radii -> N x C x H x W."""
    limit = per_image(radii, delta)
    if norm == "linf":
        return torch.minimum(torch.maximum(delta, -limit), limit)
    return delta * _shrinking(delta, limit * _SHRINK)


def _shrinking(delta: Tensor, limit: Tensor) -> Tensor:
    """What each perturbation is multiplied by to be no longer than its limit, both N x 1 x 1 x 1: at most 1."""
    return (limit / per_image(length(delta).clamp_min(_TINY), delta)).clamp_max_(1.0)


def projector(images: Tensor, radii: Tensor, norm: str, *, exact: bool = False) -> Projector:
    """Make the projection on each image's ball and on the box [0, 1]: a function N x C x H x W -> N x C x H x W.

    For linf both are one interval per pixel, so that a step clamps once. In l2 the projection on the ball comes
    first: the box moves every pixel towards its clean value, so it cannot enlarge the perturbation again. Points that
    the box has moved then lie inside the ball and not on it: ``exact`` gives the nearest point of the intersection.

    The nearest point is ``clamp(x + s (z - x))`` for the largest s <= 1 that keeps it in the ball, by the conditions of
    Karush, Kuhn and Tucker. Among the pixels that no bound stops its squared length is s^2 times a constant: solving
    for s with those that are stopped now never passes the ball, and is exact once no more of them are stopped.
    """
    limit = per_image(radii, images)
    if norm == "linf":
        low, high = (images - limit).clamp_(0, 1), (images + limit).clamp_(0, 1)
        return lambda moved: torch.clamp(moved, low, high)
    limit = limit * _SHRINK

    def inside(moved: Tensor) -> Tensor:
        delta = moved - images
        share = _shrinking(delta, limit)
        for _ in range(_STOPS if exact else 0):
            there = torch.addcmul(images, delta, share)
            free = delta * ((there >= 0) & (there <= 1))
            stopped = there.clamp_(0, 1).sub_(images) * (free == 0)
            left = (limit.square() - per_image(length(stopped), images).square()).clamp_min(0)
            wider = left.sqrt() / per_image(length(free), images).clamp_min(_TINY)
            share = torch.maximum(share, wider.clamp_max(1.0))
        found = torch.addcmul(images, delta, share).clamp_(0, 1)
        if not exact:
            return found
        # The difference of two squares is rounded more coarsely than the shrinking allows for, in large images.
        delta = found - images
        return torch.addcmul(images, delta, _shrinking(delta, limit * _SHRINK))

    return inside


def random_on_sphere(images: Tensor, radii: Tensor, norm: str, generator: torch.Generator | None) -> Tensor:
    """Draw a perturbation whose norm is the radius: APGD's start (its authors' code), before the box is applied."""
    if norm == "linf":
        delta = 2 * drawn(images, generator, torch.rand) - 1
        largest = delta.flatten(1).abs().amax(1) if delta[:1].numel() else radii
        return delta * per_image(radii / largest.clamp_min(_TINY), images)
    delta = drawn(images, generator, torch.randn)
    return delta * per_image(radii * _SHRINK / length(delta).clamp_min(_TINY), images)


def distance(images: Tensor, attacked: Tensor, norm: str) -> Tensor:
    """The size of each perturbation in raw pixel units.

    Args:
        images, attacked: N x C x H x W in [0, 1].
        norm: ``linf`` for the largest entry, ``l2`` or ``normalized-l2`` for the length.

    Returns:
        N sizes, float32 or float64.
    """
    delta = attacked - images.to(torch.promote_types(images.dtype, torch.float32))
    return delta.flatten(1).abs().amax(1) if norm == "linf" else length(delta)


def random_in_ball(images: Tensor, radii: Tensor, norm: str, generator: torch.Generator | None) -> Tensor:
    """Draw a perturbation uniformly from each image's ball (before the box [0, 1] is applied)."""
    if norm == "linf":
        return (2 * drawn(images, generator, torch.rand) - 1) * per_image(radii, images)
    # A normal vector has a uniform direction; the d-th root of a uniform number is the right law of the length.
    normal = drawn(images, generator, torch.randn)
    share = drawn(images[:, :1, :1, :1], generator, torch.rand).flatten() ** (1.0 / max(images.shape[1:].numel(), 1))
    return normal * per_image(radii * share / length(normal).clamp_min(_TINY), images)


def drawn(like: Tensor, generator: torch.Generator | None, law: Callable[..., Tensor]) -> Tensor:
    """Random numbers of a law such as ``torch.rand``, drawn on the generator's device; else like a given tensor."""
    device = like.device if generator is None else generator.device
    return law(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
