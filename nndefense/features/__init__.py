"""Features: a layer of the classifier, pooled and reduced, as one differentiable module from pixels to vectors."""

from nndefense.features.extractor import (
    PCA,
    WIDEST,
    FeatureExtractor,
    FeatureSpec,
    fit_pca,
    layer_in,
    pooled,
    raw_vectors,
    reduced,
    spread,
)
from nndefense.features.layouts import OutputLayout, layouts_in
from nndefense.features.pooling import POOLINGS, pool, rmac
from nndefense.features.taps import LAYER_ALIASES, resolve_layer, spatial_layers, tapped

__all__ = [
    "LAYER_ALIASES",
    "PCA",
    "POOLINGS",
    "WIDEST",
    "FeatureExtractor",
    "FeatureSpec",
    "OutputLayout",
    "fit_pca",
    "layer_in",
    "layouts_in",
    "pool",
    "pooled",
    "raw_vectors",
    "reduced",
    "resolve_layer",
    "rmac",
    "spatial_layers",
    "spread",
    "tapped",
]
