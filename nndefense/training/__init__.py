"""Training classifiers, repeatable under a seed and resumable."""

from nndefense.training.batch import Batch, BatchAttack, Outcome
from nndefense.training.ensemble_attack import AttackedImages, EnsembleAttack, write_attacked_images
from nndefense.training.inner_attack import STARTS, TARGETS, InnerAttack
from nndefense.training.loop import train_classifier
from nndefense.training.objectives import (
    OBJECTIVES,
    Objective,
    ObjectiveSpec,
    find_spec,
    make_objective,
    objective_name,
    standard,
)
from nndefense.training.settings import (
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
    TrainingSettings,
    default_batch_size,
    default_epochs,
)
from nndefense.training.validation import CatastrophicOverfitting, accuracy

__all__ = [
    "OBJECTIVES",
    "OPTIMIZERS",
    "PRECISIONS",
    "SCHEDULES",
    "STARTS",
    "TARGETS",
    "AttackedImages",
    "Batch",
    "BatchAttack",
    "CatastrophicOverfitting",
    "EnsembleAttack",
    "InnerAttack",
    "Objective",
    "ObjectiveSpec",
    "Outcome",
    "TrainingSettings",
    "accuracy",
    "default_batch_size",
    "default_epochs",
    "find_spec",
    "make_objective",
    "objective_name",
    "standard",
    "train_classifier",
    "write_attacked_images",
]
