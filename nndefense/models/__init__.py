"""Classifiers: built-in architectures, torchvision's, and a user's own, all from images in [0, 1] to logits."""

from nndefense.models.architectures import ARCHITECTURES, Architecture
from nndefense.models.checkpoint import save_classifier
from nndefense.models.classifier import Classifier, read_classes
from nndefense.models.load import build_classifier, load_classifier, resolve_device

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Classifier",
    "build_classifier",
    "load_classifier",
    "read_classes",
    "resolve_device",
    "save_classifier",
]
