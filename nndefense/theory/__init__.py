"""The theory of the tradeoff between standard and robust error, as a small exact laboratory.

After Raghunathan, Xie, Yang, Duchi and Liang, *Understanding and Mitigating the Tradeoff Between Robustness and
Accuracy* (ICML 2020), with the toy distributions of Tsipras et al. (ICLR 2019) and Zhang et al. (ICML 2019). NumPy and
SciPy in float64; of the house only the errors and the intervals are imported.
"""

from nndefense.theory.activations import Exciting, exciting
from nndefense.theory.decomposition import Decomposition, NoHarm, boundaries, change, decompose, harmless_share
from nndefense.theory.estimators import (
    Estimators,
    Population,
    estimators,
    min_norm,
    robust_error_in_ball,
    rst,
    rst_closed_form,
    standard_error,
)
from nndefense.theory.experiments import Count, harm_by_condition, random_populations, rst_guarantees
from nndefense.theory.staircase import LEFT_KNOTS, SIZES, Curve, Staircase, error_against_size
from nndefense.theory.toys import Intervals, RobustFeature, ThreePoints, location

__all__ = [
    "LEFT_KNOTS",
    "SIZES",
    "Count",
    "Curve",
    "Decomposition",
    "Estimators",
    "Exciting",
    "Intervals",
    "NoHarm",
    "Population",
    "RobustFeature",
    "Staircase",
    "ThreePoints",
    "boundaries",
    "change",
    "decompose",
    "error_against_size",
    "estimators",
    "exciting",
    "harm_by_condition",
    "harmless_share",
    "location",
    "min_norm",
    "random_populations",
    "robust_error_in_ball",
    "rst",
    "rst_closed_form",
    "rst_guarantees",
    "standard_error",
]
