"""Defences: modules from images N x C x H x W in [0, 1] to log-probabilities N x classes."""

from nndefense.defenses.calibration import DEFAULT_KS, OBJECTIVES, Calibration, Choice, calibrate
from nndefense.defenses.halving import RUNGS, HalvingRung
from nndefense.defenses.informed import AdaptiveAttacker
from nndefense.defenses.nearest_neighbor import Explanation, NearestNeighborDefense
from nndefense.defenses.racnn import Projection, RaCnnDefense
from nndefense.defenses.surface import RelaxedDefense, retrieval_surface

__all__ = [
    "DEFAULT_KS",
    "OBJECTIVES",
    "RUNGS",
    "AdaptiveAttacker",
    "Calibration",
    "Choice",
    "Explanation",
    "HalvingRung",
    "NearestNeighborDefense",
    "Projection",
    "RaCnnDefense",
    "RelaxedDefense",
    "calibrate",
    "retrieval_surface",
]
