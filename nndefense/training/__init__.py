"""Training classifiers, repeatable under a seed and resumable."""

from nndefense.training.accuracy import accuracy
from nndefense.training.loop import train_classifier
from nndefense.training.objectives import Objective, objective_name, standard
from nndefense.training.settings import (
    OPTIMIZERS,
    SCHEDULES,
    TrainingSettings,
    default_batch_size,
    default_epochs,
)

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Objective",
    "TrainingSettings",
    "accuracy",
    "default_batch_size",
    "default_epochs",
    "objective_name",
    "standard",
    "train_classifier",
]
