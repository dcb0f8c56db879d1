"""What a training minimises: each objective is a pure function of (model, batch, attack)."""

from nndefense.training.batch import Objective
from nndefense.training.objectives.registry import (
    OBJECTIVES,
    ObjectiveSpec,
    find_spec,
    make_objective,
    objective_name,
    weights_of,
)
from nndefense.training.objectives.retrieval import retrieval, retrieval_standard, retrieval_trades
from nndefense.training.objectives.supervised import (
    adversarial,
    alp,
    clp,
    ensemble_adversarial,
    half_half,
    interpolated,
    noise_augmentation,
    random_augmentation,
    standard,
    trades,
    worst_of_10,
)
from nndefense.training.objectives.unlabelled import robust_consistency, rst, rst_at, rst_trades, self_training

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
    "noise_augmentation",
    "objective_name",
    "random_augmentation",
    "retrieval",
    "retrieval_standard",
    "retrieval_trades",
    "robust_consistency",
    "rst",
    "rst_at",
    "rst_trades",
    "self_training",
    "standard",
    "trades",
    "weights_of",
    "worst_of_10",
]
