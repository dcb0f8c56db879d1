"""nndefense: the nearest-neighbour defence against adversarial images, and an honest comparison around it.

The public names are imported when they are first used, so that importing the package is quick and starts nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nndefense import attacks, datasets, evaluation
    from nndefense.database import ImageDatabase
    from nndefense.datasets import open_dataset
    from nndefense.defenses import NearestNeighborDefense
    from nndefense.errors import NNDefenseError
    from nndefense.features import FeatureSpec
    from nndefense.models import Classifier, build_classifier, load_classifier, save_classifier

__version__ = "0.1.0"

_HOMES = {
    "Classifier": "nndefense.models",
    "FeatureSpec": "nndefense.features",
    "ImageDatabase": "nndefense.database",
    "NNDefenseError": "nndefense.errors",
    "NearestNeighborDefense": "nndefense.defenses",
    "build_classifier": "nndefense.models",
    "load_classifier": "nndefense.models",
    "open_dataset": "nndefense.datasets",
    "save_classifier": "nndefense.models",
}
_MODULES = ("attacks", "database", "datasets", "defenses", "evaluation", "features", "models", "theory", "training")

__all__ = [
    "Classifier",
    "FeatureSpec",
    "ImageDatabase",
    "NNDefenseError",
    "NearestNeighborDefense",
    "attacks",
    "build_classifier",
    "datasets",
    "evaluation",
    "load_classifier",
    "open_dataset",
    "save_classifier",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"nndefense.{name}")
    raise AttributeError(f"module 'nndefense' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
