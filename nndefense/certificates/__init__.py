"""Certificates: for each image a radius within which no change of the image changes what is answered.

The names are imported when they are first used, so that the ``registry`` lists the methods at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nndefense.faces import importing

if TYPE_CHECKING:
    from nndefense.certificates import registry
    from nndefense.certificates.affine import certify_exact
    from nndefense.certificates.bounds import certify_bounds
    from nndefense.certificates.record import Certified, CertifiedAccuracy
    from nndefense.certificates.registry import CertificateMethod
    from nndefense.certificates.smoothed_features import SmoothedFeatures, certify_smoothed_features
    from nndefense.certificates.smoothing import SmoothedClassifier, certify, certify_smoothing, predict

_NAMES = {
    "affine": "certify_exact",
    "bounds": "certify_bounds",
    "record": "Certified CertifiedAccuracy",
    "registry": "CertificateMethod",
    "smoothed_features": "SmoothedFeatures certify_smoothed_features",
    "smoothing": "SmoothedClassifier certify certify_smoothing predict",
}
_HOMES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names.split()}
__getattr__ = importing(__name__, _HOMES | {"registry": f"{__name__}.registry"})

__all__ = [
    "CertificateMethod", "Certified", "CertifiedAccuracy", "SmoothedClassifier", "SmoothedFeatures", "certify",
    "certify_bounds", "certify_exact", "certify_smoothed_features", "certify_smoothing", "predict", "registry",
]  # fmt: skip
