"""From pixels to the vector that is searched for: one differentiable module; and the PCA in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nndefense.errors import InputError, make_plain
from nndefense.features.layouts import OutputLayout, layouts_in
from nndefense.features.pooling import check_pooling, pool
from nndefense.features.taps import Truncated, resolve_layer, tapped
from nndefense.modes import EvaluationOnly
from nndefense.unwrapping import unwrapped

#: Raw vectors longer than this are no candidates: their PCA would cost more than all the others together.
WIDEST = 8192
_BLOCK = 1 << 23
"""Numbers of a sample that are held in float64 at once."""


@dataclass(frozen=True)
class FeatureSpec:
    """Layer -> pooling -> PCA -> length 1.

    Attributes:
        layer: a module's name in the classifier's net, such as ``layer3.5``, or one of :data:`LAYER_ALIASES`.
        pooling: ``avg``, ``max``, ``grid4`` (any G), ``rmac``, ``flatten``, or ``cls`` for a class token alone.
        pca: keep at most this many dimensions; vectors that are no longer than that are left as they are unless
            they are whitened. 0 turns PCA off.
        whiten: scale each PCA coordinate to variance 1.
        normalize: scale each vector to length 1 at the end, so that distances compare directions.
    """

    layer: str
    pooling: str = "avg"
    pca: int = 256
    whiten: bool = False
    normalize: bool = False

    def __post_init__(self) -> None:
        make_plain(self)
        check_pooling(self.pooling)
        if self.pca < 0:
            raise InputError(f"the PCA dimension is {self.pca}, but must be at least 1, or 0 for none")
        if self.whiten and self.pca == 0:
            raise InputError("whitening scales PCA coordinates: give a PCA dimension of at least 1")

    def __str__(self) -> str:
        parts = [self.layer, self.pooling]
        if self.pca:
            parts.append(f"pca{self.pca}" + ("w" if self.whiten else ""))
        return ":".join(parts + (["unit"] if self.normalize else []))

    def to_json(self) -> dict[str, Any]:
        """The plain values, for a manifest."""
        return asdict(self)


def pooled(activation: Tensor, spec: FeatureSpec, layout: OutputLayout | None = None) -> Tensor:
    """A layer's output -> the raw vectors N x D, float32, that PCA is fitted on.

    Args:
        activation: of the layer, laid out as :func:`pool` takes it.
        spec: with the pooling.
        layout: which axis is what; None as for :func:`pool`.
    """
    return pool(activation, spec.pooling, layout).float()


def fit_pca(sample: Tensor, spec: FeatureSpec) -> PCA | None:
    """Fit the PCA that ``spec`` asks for on a ``sample`` of raw vectors N x D, or None where they need none."""
    if spec.pca == 0 or (sample.shape[1] <= spec.pca and not spec.whiten):
        return None
    return PCA.fit(sample, min(spec.pca, sample.shape[1]), whiten=spec.whiten)


def reduced(vectors: Tensor, spec: FeatureSpec, pca: PCA | None) -> Tensor:
    """Raw ``vectors`` N x D -> the final ones N x d, by the ``pca``, if any, and of length 1 where ``spec`` says so."""
    if pca is not None:
        vectors = pca(vectors)
    return F.normalize(vectors, dim=1) if spec.normalize else vectors


class FeatureExtractor(EvaluationOnly):
    """Images -> feature vectors: layer, pooling, PCA, length (Dubey et al. 2019, section 3).

    Only the part of the net up to the layer is computed. It shares the classifier's parameters; gradients flow
    from the vectors back to the pixels. The net runs in evaluation mode, whatever mode it is in.
    """

    def __init__(self, net: nn.Module, spec: FeatureSpec, pca: PCA | None, example: Tensor) -> None:
        """
        Args:
            net: the classifier, images N x C x H x W in [0, 1] -> logits, normalisation inside; layer names are
                relative to its ``net`` attribute where it has one.
            spec: what to extract.
            pca: as fitted by :func:`fit_pca`, or None.
            example: a batch of images on which the truncated net is checked.
        """
        super().__init__()
        self.spec, net = spec, unwrapped(net)
        layer = layer_in(net, spec.layer)
        self.truncated = Truncated(net, layer, example)
        self.layout = layouts_in(net, [layer], example)[layer]
        self.pca = pca

    def forward(self, images: Tensor) -> Tensor:
        """``images`` N x C x H x W in [0, 1] -> vectors N x d, float32."""
        if images.dtype is not torch.float32:
            images = images.to(next((parameter.dtype for parameter in self.parameters()), torch.float32))
        return reduced(pooled(self.truncated(images), self.spec, self.layout), self.spec, self.pca)

    def with_answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors N x d of ``images`` N x C x H x W in [0, 1] and the net's own answer, logits N x classes, from
        one forward pass, not two.
        """
        if images.dtype is not torch.float32:
            images = images.to(next((parameter.dtype for parameter in self.parameters()), torch.float32))
        output, answer = self.truncated.with_answer(images)
        return reduced(pooled(output, self.spec, self.layout), self.spec, self.pca), answer

    def dimension(self, example: Tensor) -> int:
        """The length d of the vectors, from one forward pass on ``example``."""
        with torch.no_grad():
            return int(self(example).shape[1])


def layer_in(classifier: nn.Module, layer: str) -> str:
    """The name, within the whole classifier, of a layer that is named within its bare net."""
    net = getattr(classifier, "net", None)
    if isinstance(net, nn.Module):
        return "net." + resolve_layer(net, layer)
    return resolve_layer(classifier, layer)


def spread(names: list[str], count: int) -> list[str]:
    """Choose at most ``count`` of the names, evenly from the first to the last."""
    if len(names) <= count or count < 2:
        return names[:count]
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


@torch.no_grad()
def raw_vectors(
    net: nn.Module, layers: Sequence[str], poolings: Sequence[str], example: Tensor
) -> list[list[Tensor | None]]:
    """The raw vectors N x D of N example images for each layer (a row) and pooling; None where it does not allow that.

    Args:
        net: images N x C x H x W in [0, 1] -> logits.
        layers, poolings: by name.
        example: the images.

    Raises:
        InputError: a layer that does not exist, or that no pooling suits.
    """
    net = unwrapped(net)
    inside = [layer_in(net, layer) for layer in layers]
    # An alias may name a layer again.
    once = list(dict.fromkeys(inside))
    layouts = layouts_in(net, once, example)
    with tapped(net, once) as outputs:
        net(example)
    return [[_raw(outputs[layer], pooling, layouts[layer]) for pooling in poolings] for layer in inside]


def _raw(output: Tensor, pooling: str, layout: OutputLayout) -> Tensor | None:
    if pooling == "cls" and (output.dim() == 2 or not layout.prefix):
        return None
    if output.dim() == 3 and layout.grid is None and pooling not in ("avg", "max", "flatten", "cls"):
        return None
    return pool(output, pooling, layout).float()


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

        Beside the sample, memory holds blocks of it and some four matrices of the smaller of N and D a side.

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
                f"dimensions, but was given {n} of {width}: lower the PCA dimension (--pca) or give more "
                "images"
            )
        total = torch.zeros(width, dtype=torch.float64, device=sample.device)
        for rows in torch.split(sample, max(1, _BLOCK // width)):
            total += rows.double().sum(0)
        mean = total / n
        if not bool(torch.isfinite(mean).all()):
            raise InputError("the feature vectors hold NaN or infinite values: check the images and the classifier")
        # Of the two equivalent symmetric eigenproblems, take the smaller one.
        products = torch.zeros((min(n, width),) * 2, dtype=torch.float64, device=sample.device)
        if width <= n:
            for rows in torch.split(sample, max(1, _BLOCK // width)):
                centred = rows.double() - mean
                products.addmm_(centred.T, centred)
            variance, vectors = torch.linalg.eigh(products)
            axes = vectors[:, -dimension:].flip(1)
        else:
            size = max(1, _BLOCK // n)
            blocks = list(zip(torch.split(sample, size, 1), torch.split(mean, size), strict=True))
            for columns, part in blocks:
                centred = columns.double() - part
                products.addmm_(centred, centred.T)
            variance, vectors = torch.linalg.eigh(products)
            leading = vectors[:, -dimension:].flip(1)
            # These columns are orthogonal already; QR also finds axes where the sample has no variance left.
            axes = torch.linalg.qr(torch.cat([(columns.double() - part).T @ leading for columns, part in blocks])).Q
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
