"""Principal component analysis as a module: N x D -> N x d, exact, the same on every machine up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nndefense.errors import InputError


class PCA(nn.Module):
    """Project centred vectors on their leading principal axes, optionally scaling each axis to variance 1.

    Attributes (buffers, so that they move and are saved with the module):
        mean: D, the mean of the sample.
        axes: D x d, orthonormal columns; each axis's entry of largest size is positive, which fixes its sign.
        scale: d, what each coordinate is divided by: 1, or its standard deviation when whitening.
    """

    mean: Tensor
    axes: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, axes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("axes", axes)
        self.register_buffer("scale", scale)

    @classmethod
    def fit(cls, sample: Tensor, dimension: int, *, whiten: bool = False) -> PCA:
        """Fit on a sample N x D, in float64.

        Args:
            sample: N x D with N > 1.
            dimension: d, the number of axes to keep, at most min(D, N - 1).
            whiten: divide each coordinate by its standard deviation on the sample.

        Raises:
            InputError: too few samples, more axes than the sample determines, or values that are not finite.
        """
        n, width = sample.shape
        if not 1 <= dimension <= min(width, n - 1):
            raise InputError(
                f"PCA to {dimension} dimensions needs at least {dimension + 1} images and as many feature "
                f"dimensions, but was given {n} of {width}: lower the PCA dimension or give more images"
            )
        if not bool(torch.isfinite(sample).all()):
            raise InputError("the feature vectors hold NaN or infinite values: check the images and the classifier")
        sample = sample.double()
        mean = sample.mean(0)
        centred = sample - mean
        # Of the two equivalent symmetric eigenproblems, take the smaller one.
        if width <= n:
            variance, vectors = torch.linalg.eigh(centred.T @ centred)
            axes = vectors[:, -dimension:].flip(1)
        else:
            variance, vectors = torch.linalg.eigh(centred @ centred.T)
            # These columns are orthogonal already; QR also finds axes where the sample has no variance left.
            axes = torch.linalg.qr(centred.T @ vectors[:, -dimension:].flip(1)).Q
        deviation = (variance[-dimension:].flip(0).clamp_min(0) / (n - 1)).sqrt()
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        # An axis without variance holds nothing but rounding errors: scaling them up would only add noise.
        floor = deviation[0] * 1e-6
        one = torch.ones_like(deviation)
        scale = torch.where(deviation > floor, deviation, one) if whiten else one
        return cls(mean.float(), axes.float(), scale.float())

    def forward(self, vectors: Tensor) -> Tensor:
        """N x D -> N x d, of the vectors' own type.

        Raises:
            InputError: vectors of another length than those that the PCA was fitted on.
        """
        if vectors.shape[1] != len(self.mean):
            raise InputError(
                f"the layer gives vectors of length {vectors.shape[1]}, but the PCA was fitted on {len(self.mean)}: "
                "give images of the size that it was fitted on"
            )
        mean, axes, scale = (buffer.to(vectors.dtype) for buffer in (self.mean, self.axes, self.scale))
        projected: Tensor = (vectors - mean) @ axes / scale
        return projected
