"""What a training minimises: each objective is a pure function of (model, batch, attack)."""

from nndefense.training.batch import Objective
from nndefense.training.objectives.ensemble import ensemble_adversarial
from nndefense.training.objectives.interpolated import interpolated
from nndefense.training.objectives.logit_pairing import alp, clp
from nndefense.training.objectives.registry import (
    OBJECTIVES,
    ObjectiveSpec,
    find_spec,
    make_objective,
    objective_name,
)
from nndefense.training.objectives.self_training import robust_consistency, rst, rst_at, rst_trades, self_training
from nndefense.training.objectives.spatial import random_augmentation, worst_of_10
from nndefense.training.objectives.supervised import adversarial, half_half, standard
from nndefense.training.objectives.tradeoff import trades

__all__ = [
    "OBJECTIVES",
    "Objective",
    "ObjectiveSpec",
    "adversarial",
    "alp",
    "clp",
    "ensemble_adversarial",
    "find_spec",
    "half_half",
    "interpolated",
    "make_objective",
    "objective_name",
    "random_augmentation",
    "robust_consistency",
    "rst",
    "rst_at",
    "rst_trades",
    "self_training",
    "standard",
    "trades",
    "worst_of_10",
]
