"""The input transformations of Guo et al. (ICLR 2018), and the defences made of them."""

from nndefense.defenses.transforms.compression import BitDepth, Jpeg, bit_depth_reduction, jpeg_compression
from nndefense.defenses.transforms.crops import GridCropEnsemble, GridCrops, RandomCrop, crop_ensemble, resized_crops
from nndefense.defenses.transforms.total_variation import (
    TotalVariation,
    TvSolution,
    minimize_total_variation,
    tv_minimization,
)
from nndefense.defenses.transforms.tv_problem import TvProblem, total_variation

__all__ = [
    "BitDepth",
    "GridCropEnsemble",
    "GridCrops",
    "Jpeg",
    "RandomCrop",
    "TotalVariation",
    "TvProblem",
    "TvSolution",
    "bit_depth_reduction",
    "crop_ensemble",
    "jpeg_compression",
    "minimize_total_variation",
    "resized_crops",
    "total_variation",
    "tv_minimization",
]
