"""The geometry of RP2 (Eykholt et al., CVPR 2018, section 3.3): homographies, and views that change synthetically.

Points are in frame coordinates: x from -1 (left edge) to 1 (right edge), y from -1 (top) to 1 (bottom), whatever the
size of the image in pixels; the edges are those of the outer pixels, not their centres.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nndefense.errors import InputError

#: The corners of a frame, in the order in which corner points are given: clockwise from the top left.
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
    """Map ``points`` N x P x 2 by homographies, ``matrices`` N x 3 x 3 -> N x P x 2, in float64."""
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


@dataclass(frozen=True)
class Views:
    """Drawn view changes: from the photo's frame to the new one, and a factor on its brightness.

    Attributes:
        matrices: n x 3 x 3 homographies in float64.
        gains: n factors, float64.
    """

    matrices: Tensor
    gains: Tensor

    def __len__(self) -> int:
        """The number of views."""
        return len(self.gains)

    def __call__(self, images: Tensor) -> Tensor:
        """Show n images from their new views: n x C x H x W in [0, 1], differentiable in the images."""
        size = (images.shape[2], images.shape[3])
        # A view beyond the photo's edge shows its border, not black: a black frame would be a clue of its own.
        shown = warp(images, self.matrices, size, padding="border")
        return (shown * self.gains.to(images).view(-1, 1, 1, 1)).clamp(0, 1)


@dataclass(frozen=True)
class ViewChanges:
    """How far views may change. The released code's object attack has (.1, 2), .2 and .1.

    Attributes:
        brightness: the least and the largest factor on all pixels; uniform between them.
        crop: the largest share of the side that is cut off at each edge, uniform from 0; in [0, 0.5).
        perspective: standard deviation of each corner's shift, as a share of the side; a normal law cut off at a
            sixth of the side, so that the corners keep their order with any crop.

    Raises:
        InputError: a strength out of its range.
    """

    brightness: tuple[float, float] = (0.6, 1.4)
    crop: float = 0.1
    perspective: float = 0.03

    def __post_init__(self) -> None:
        low, high = self.brightness
        if not 0 < low <= high < float("inf"):
            raise InputError(f"brightness is {low:g} to {high:g}, but must be factors above 0, the lesser one first")
        if not 0 <= self.crop <= 0.3:
            raise InputError(f"crop is {self.crop:g}, but must be a share of the side from 0 to 0.3")
        if not 0 <= self.perspective <= 0.2:
            raise InputError(f"perspective is {self.perspective:g}, but must be a share of the side from 0 to 0.2")

    def draw(self, n: int, generator: torch.Generator) -> Views:
        """Draw n view changes; the same state of the generator gives the same ones on every device.

        Args:
            n: number of views.
            generator: on the CPU.
        """
        numbers = torch.rand(n, 5, generator=generator, dtype=torch.float64)
        # In frame coordinates the side is 2 long. Corners of the part that will fill the new view:
        left, top, right, bottom = (2 * self.crop * numbers[:, :4]).unbind(1)
        corners = frame(n).clone()
        corners[:, [0, 3], 0] += left[:, None]
        corners[:, [1, 2], 0] -= right[:, None]
        corners[:, [0, 1], 1] += top[:, None]
        corners[:, [2, 3], 1] -= bottom[:, None]
        shifts = torch.empty(n, 4, 2, dtype=torch.float64)
        torch.nn.init.trunc_normal_(shifts, std=1.0, a=-3.0, b=3.0, generator=generator)
        corners += (2 * self.perspective * shifts).clamp(-1 / 3, 1 / 3)
        low, high = self.brightness
        return Views(homography(corners, frame(n)), low + (high - low) * numbers[:, 4])


def as_photographed(n: int) -> Views:
    """n views that change nothing."""
    return Views(torch.eye(3, dtype=torch.float64).expand(n, 3, 3), torch.ones(n, dtype=torch.float64))


#: The strengths of the released code's attack on objects, for those who want to compare with it.
RELEASED = ViewChanges(brightness=(0.1, 2.0), crop=0.2, perspective=0.1)
