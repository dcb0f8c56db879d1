"""Attacks: functions of a callable from images to logits; they know nothing of classifiers or defences."""

from nndefense.attacks.gradient import fgsm, pgd
from nndefense.attacks.norms import NORMS, Norm, radius

__all__ = ["NORMS", "Norm", "fgsm", "pgd", "radius"]
