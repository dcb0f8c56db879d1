"""Homographies, and images carried by them: the geometry of T_i in RP2 (Eykholt et al., CVPR 2018, section 3.3).

Points are in frame coordinates: x from -1 (left edge) to 1 (right edge), y from -1 (top) to 1 (bottom), whatever the
size of the image in pixels; the edges are those of the outer pixels, not their centres.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nndefense.errors import InputError

# The corners of a frame, in the order in which corner points are given: clockwise from the top left.
FRAME = ((-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0))
# Far enough outside the frame that no pixel of it is touched.
_OUTSIDE = 4.0


def frame(n: int = 1) -> Tensor:
    """The corners of n frames: n x 4 x 2, float64."""
    return torch.tensor(FRAME, dtype=torch.float64).expand(n, 4, 2)


def homography(source: Tensor, target: Tensor) -> Tensor:
    """The homographies that carry four points each onto four others.

    The direct linear transformation with the last entry 1: eight equations in eight unknowns, in float64.

    Args:
        source: N x 4 x 2 points, clockwise from the top left.
        target: N x 4 x 2 points in the same order.

    Returns:
        N x 3 x 3 matrices in float64 that map homogeneous source points to target points. Equal points give the
        identity exactly.

    Raises:
        InputError: not four finite points each, or three of them on a line (or so near to one that rounding decides).
    """
    source, target = source.double(), target.double()
    if source.shape != target.shape or source.dim() != 3 or source.shape[1:] != (4, 2):
        raise InputError(
            f"a homography needs two times N x 4 x 2 points, not {tuple(source.shape)} and {tuple(target.shape)}"
        )
    if not bool(torch.isfinite(source).all() and torch.isfinite(target).all()):
        raise InputError("a homography needs finite points")
    for name, points in (("source", source), ("target", target)):
        turns = _turns(points)
        if not bool(((turns > 1e-9).all(1) | (turns < -1e-9).all(1)).all()):
            raise InputError(
                f"the four {name} points of a homography must be the corners of a convex quadrilateral, in turn "
                "(top left, top right, bottom right, bottom left), no three of them on a line"
            )
    (x, y), (u, v) = source.unbind(-1), target.unbind(-1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    upper = torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y], -1)
    lower = torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y], -1)
    entries = torch.linalg.solve(torch.cat([upper, lower], 1), torch.cat([u, v], 1))
    matrices = torch.cat([entries, torch.ones_like(entries[:, :1])], 1).view(-1, 3, 3)
    # Rounding would make every pixel of an aligned photo a mixture with its neighbours.
    same = (source == target).all(-1).all(-1).view(-1, 1, 1)
    return torch.where(same, torch.eye(3, dtype=torch.float64, device=source.device), matrices)


def _turns(points: Tensor) -> Tensor:
    """The cross products at the corners, N x 4: all of one sign where the quadrilateral is convex."""
    edges = points.roll(-1, 1) - points
    following = edges.roll(-1, 1)
    return edges[..., 0] * following[..., 1] - edges[..., 1] * following[..., 0]


def carry(points: Tensor, matrices: Tensor) -> Tensor:
    """Map points by homographies: N x P x 2 and N x 3 x 3 -> N x P x 2, in float64."""
    matrices = matrices.double()
    mapped = points.double() @ matrices[:, :, :2].transpose(1, 2) + matrices[:, None, :, 2]
    return mapped[..., :2] / mapped[..., 2:]


def warp(images: Tensor, matrices: Tensor, size: tuple[int, int], *, padding: str = "zeros") -> Tensor:
    """Carry images by homographies, differentiable in the images.

    Each pixel of the result is read, bilinearly, from where its centre came from. Aligned images (identity, equal
    size) are returned as they are, bit for bit. There is no low-pass filter: an image that is shrunk to less than
    half its size aliases, so make the canonical frame about as large as the object appears.

    Args:
        images: N x C x h x w.
        matrices: N x 3 x 3, from the images' frame to the frame of the result.
        size: height and width of the result.
        padding: ``zeros`` outside the image, or ``border`` for its nearest pixel.

    Returns:
        N x C x height x width, of the images' dtype and device.
    """
    aligned = torch.eye(3, dtype=matrices.dtype, device=matrices.device)
    if tuple(images.shape[2:]) == tuple(size) and bool((matrices == aligned).all()):
        return images
    height, width = size
    across = (torch.arange(width, dtype=torch.float64) * 2 + 1) / width - 1
    down = (torch.arange(height, dtype=torch.float64) * 2 + 1) / height - 1
    centres = torch.stack(torch.meshgrid(across, down, indexing="xy"), -1).view(1, -1, 2).to(images.device)
    inverse = torch.linalg.inv(matrices.double().to(images.device))
    mapped = centres @ inverse[:, :, :2].transpose(1, 2) + inverse[:, None, :, 2]
    depth = mapped[..., 2:]
    # The frame's middle lies before the camera; what has the other sign lies behind it and is not seen.
    seen = depth * inverse[:, 2:, 2:].sign() > 1e-9
    places = torch.where(seen, mapped[..., :2] / torch.where(seen, depth, torch.ones_like(depth)), _OUTSIDE)
    grid = places.clamp(-_OUTSIDE, _OUTSIDE).view(-1, height, width, 2).to(images.dtype)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=False)
