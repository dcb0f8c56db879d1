"""From pixels to the vector that is searched for: one differentiable module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nndefense.errors import InputError
from nndefense.features.pca import PCA
from nndefense.features.pooling import check_pooling, pool
from nndefense.features.taps import Truncated, resolve_layer, tapped

#: Raw vectors longer than this are no candidates: their PCA would cost more than all the others together.
WIDEST = 8192


@dataclass(frozen=True)
class FeatureSpec:
    """Layer -> pooling -> PCA -> length 1.

    Attributes:
        layer: a module's name in the classifier's net, such as ``layer3.5``, or one of :data:`LAYER_ALIASES`.
        pooling: ``avg``, ``max``, ``grid4`` (any G), ``rmac`` or ``flatten``.
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


def pooled(activation: Tensor, spec: FeatureSpec) -> Tensor:
    """A layer's output -> the raw vectors N x D that PCA is fitted on."""
    return pool(activation, spec.pooling).float()


def fit_pca(sample: Tensor, spec: FeatureSpec) -> PCA | None:
    """Fit the PCA that ``spec`` asks for on raw vectors N x D, or None where they need none."""
    if spec.pca == 0 or (sample.shape[1] <= spec.pca and not spec.whiten):
        return None
    return PCA.fit(sample, min(spec.pca, sample.shape[1]), whiten=spec.whiten)


def reduced(vectors: Tensor, spec: FeatureSpec, pca: PCA | None) -> Tensor:
    """Raw vectors N x D -> the final vectors N x d."""
    if pca is not None:
        vectors = pca(vectors)
    return F.normalize(vectors, dim=1) if spec.normalize else vectors


class FeatureExtractor(nn.Module):
    """Images -> feature vectors: layer, pooling, PCA, length (Dubey et al. 2019, section 3).

    Only the part of the net up to the layer is computed. It shares the classifier's parameters; gradients flow
    from the vectors back to the pixels.
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
        self.spec = spec
        self.truncated = Truncated(net, layer_in(net, spec.layer), example)
        self.pca = pca

    def forward(self, images: Tensor) -> Tensor:
        """N x C x H x W in [0, 1] -> N x d, float32."""
        return reduced(pooled(self.truncated(images), self.spec), self.spec, self.pca)

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
def vector_widths(net: nn.Module, layers: Sequence[str], poolings: Sequence[str], example: Tensor) -> list[list[int]]:
    """How long the raw vectors of each layer (a row) are with each pooling, from one forward pass on ``example``."""
    inside = [layer_in(net, layer) for layer in layers]
    with tapped(net, inside) as outputs:
        net(example)
    return [[pool(outputs[layer], pooling).shape[1] for pooling in poolings] for layer in inside]
