"""What a feature vector is made of: which layer, how pooled, how reduced."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nndefense.errors import InputError
from nndefense.features.pooling import check_pooling

# The paper's names of ResNet-50's layers (Dubey et al. 2019, section 4) as torchvision's modules.
LAYER_ALIASES = {"conv_2_3": "layer1.2", "conv_3_4": "layer2.3", "conv_4_6": "layer3.5", "conv_5_1": "layer4.0"}


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
