"""Attacks: functions of a callable from images to logits; they know nothing of classifiers or defences."""

from nndefense.attacks.apgd import apgd
from nndefense.attacks.autoattack import ATTACKS, WorstCase, autoattack
from nndefense.attacks.carlini_wagner import carlini_wagner
from nndefense.attacks.checks import check_labels, check_logits, check_model
from nndefense.attacks.counting import Counted
from nndefense.attacks.deepfool import deepfool
from nndefense.attacks.fab import fab
from nndefense.attacks.gradient import fgsm, pgd
from nndefense.attacks.losses import LOSSES, Loss, cross_entropy, dlr, kl, margin, targeted_dlr
from nndefense.attacks.norms import NORMS, Norm, distance, radius
from nndefense.attacks.objective import Model
from nndefense.attacks.result import Result, run
from nndefense.attacks.spatial import SpatialAttack, rotated_and_shifted, spatial_grid
from nndefense.attacks.square import square
from nndefense.attacks.wrappers import Bpda, Eot

__all__ = [
    "ATTACKS",
    "LOSSES",
    "NORMS",
    "Bpda",
    "Counted",
    "Eot",
    "Loss",
    "Model",
    "Norm",
    "Result",
    "SpatialAttack",
    "WorstCase",
    "apgd",
    "autoattack",
    "carlini_wagner",
    "check_labels",
    "check_logits",
    "check_model",
    "cross_entropy",
    "deepfool",
    "distance",
    "dlr",
    "fab",
    "fgsm",
    "kl",
    "margin",
    "pgd",
    "radius",
    "rotated_and_shifted",
    "run",
    "spatial_grid",
    "square",
    "targeted_dlr",
]
