"""nndefense: the nearest-neighbour defence against adversarial images, and an honest comparison around it.

The public names are imported when they are first used, so that importing the package is quick and starts nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nndefense.faces import importing

if TYPE_CHECKING:
    from nndefense import (
        attacks,
        database,
        datasets,
        defenses,
        evaluation,
        features,
        models,
        pipeline,
        theory,
        training,
    )
    from nndefense.database import ImageDatabase
    from nndefense.datasets import open_dataset
    from nndefense.defenses import NearestNeighborDefense
    from nndefense.errors import NNDefenseError
    from nndefense.features import FeatureSpec
    from nndefense.guard import Guard
    from nndefense.models import Classifier, build_classifier, load_classifier, save_classifier

__version__ = "0.2.0"

_HOMES = {
    "Classifier": "nndefense.models",
    "FeatureSpec": "nndefense.features",
    "Guard": "nndefense.guard",
    "ImageDatabase": "nndefense.database",
    "NNDefenseError": "nndefense.errors",
    "NearestNeighborDefense": "nndefense.defenses",
    "build_classifier": "nndefense.models",
    "load_classifier": "nndefense.models",
    "open_dataset": "nndefense.datasets",
    "save_classifier": "nndefense.models",
    **{
        room: f"nndefense.{room}"
        for room in (
            "attacks", "database", "datasets", "defenses", "evaluation", "features", "models", "pipeline", "theory",
            "training",
        )
    },
}  # fmt: skip

__getattr__ = importing(__name__, _HOMES)

__all__ = [
    "Classifier",
    "FeatureSpec",
    "Guard",
    "ImageDatabase",
    "NNDefenseError",
    "NearestNeighborDefense",
    "attacks",
    "build_classifier",
    "database",
    "datasets",
    "defenses",
    "evaluation",
    "features",
    "load_classifier",
    "models",
    "open_dataset",
    "pipeline",
    "save_classifier",
    "theory",
    "training",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
