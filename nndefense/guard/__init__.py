"""The guard: defended predictions to rely on, which do not depend on their batch, as a Python call."""

from nndefense.guard.guard import HELD_BYTES, Guard
from nndefense.guard.percentile import FILE, Percentile, check_rate
from nndefense.guard.pictures import Sample
from nndefense.guard.prediction import Defended, Neighbor, Opinion

__all__ = ["FILE", "HELD_BYTES", "Defended", "Guard", "Neighbor", "Opinion", "Percentile", "Sample", "check_rate"]
