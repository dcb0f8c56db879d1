"""Attacks: functions of a callable from images to logits; they know nothing of classifiers or defences.

The names are imported when they are first used, so that :mod:`nndefense.attacks.registry` can list the attacks at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nndefense.faces import importing

if TYPE_CHECKING:
    from nndefense.attacks.auto_pgd import apgd
    from nndefense.attacks.checks import check_labels, check_logits, check_model
    from nndefense.attacks.expectation import eot_pgd
    from nndefense.attacks.fast_boundary import fab
    from nndefense.attacks.gradient import fgsm, pgd
    from nndefense.attacks.least_l2 import carlini_wagner, deepfool
    from nndefense.attacks.losses import LOSSES, Loss, Model, cross_entropy, dlr, kl, margin, targeted_dlr
    from nndefense.attacks.norms import distance, radius
    from nndefense.attacks.random_squares import square
    from nndefense.attacks.registry import NORMS, Attack, Norm, register
    from nndefense.attacks.spatial import SpatialAttack, rotated_and_shifted, spatial_grid
    from nndefense.attacks.standard_sequence import ATTACKS, Counted, Result, WorstCase, autoattack, run
    from nndefense.attacks.wrappers import Bpda, Eot

_NAMES = {
    "auto_pgd": "apgd",
    "least_l2": "carlini_wagner deepfool",
    "checks": "check_labels check_logits check_model",
    "expectation": "eot_pgd",
    "fast_boundary": "fab",
    "gradient": "fgsm pgd",
    "losses": "LOSSES Loss Model cross_entropy dlr kl margin targeted_dlr",
    "norms": "distance radius",
    "random_squares": "square",
    "registry": "NORMS Attack Norm register",
    "spatial": "SpatialAttack rotated_and_shifted spatial_grid",
    "standard_sequence": "ATTACKS Counted Result WorstCase autoattack run",
    "wrappers": "Bpda Eot",
}
__getattr__ = importing(
    __name__, {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names.split()}
)

__all__ = [
    "ATTACKS", "LOSSES", "NORMS", "Attack", "Bpda", "Counted", "Eot", "Loss", "Model", "Norm", "Result",
    "SpatialAttack", "WorstCase", "apgd", "autoattack", "carlini_wagner", "check_labels", "check_logits",
    "check_model", "cross_entropy", "deepfool", "distance", "dlr", "eot_pgd", "fab", "fgsm", "kl", "margin", "pgd",
    "radius", "register", "rotated_and_shifted", "run", "spatial_grid", "square", "targeted_dlr",
]  # fmt: skip
