"""Certificates: for each image a radius within which no change of the image changes what is answered."""

from nndefense.certificates.affine import certify_exact
from nndefense.certificates.record import Certified, CertifiedAccuracy
from nndefense.certificates.registry import CertificateMethod
from nndefense.certificates.smoothing import SmoothedClassifier, certify, certify_smoothing, predict

__all__ = [
    "CertificateMethod",
    "Certified",
    "CertifiedAccuracy",
    "SmoothedClassifier",
    "certify",
    "certify_exact",
    "certify_smoothing",
    "predict",
]
