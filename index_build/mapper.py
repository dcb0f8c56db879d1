"""Mapper: a batch of images -> posteriors and raw feature vectors, in one forward pass for any number of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nndefense.features import FeatureSpec, layer_in, pooled, tapped
from nndefense.images import check_images
from nndefense.models import Classifier


@dataclass(frozen=True)
class Mapped:
    """What the classifier says of N images: posteriors N x classes, and N x D raw vectors for each feature."""

    posteriors: Tensor
    vectors: tuple[Tensor, ...]


class Mapper:
    """Runs the classifier once per batch and pools every layer that is asked for (Dubey et al. 2019, section 3)."""

    def __init__(self, classifier: Classifier, features: Sequence[FeatureSpec], device: torch.device) -> None:
        self.classifier, self.features, self.device = classifier, tuple(features), device
        self.layers = [layer_in(classifier, feature.layer) for feature in self.features]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Mapped:
        """Map images N x C x H x W in [0, 1].

        Raises:
            InputError: images that are not finite, not in [0, 1] or of another shape than the classifier takes.
        """
        check_images(images, channels=self.classifier.input_shape[0])
        with tapped(self.classifier, sorted(set(self.layers))) as outputs:
            logits = self.classifier(images.to(self.device))
        vectors = tuple(
            pooled(outputs[layer], feature) for layer, feature in zip(self.layers, self.features, strict=True)
        )
        return Mapped(logits.float().softmax(1), vectors)
