"""The input transformations of Guo et al. (ICLR 2018), and the defences made of them."""

from nndefense.defenses.transforms.compression import BitDepth, Jpeg
from nndefense.defenses.transforms.crops import GridCrops, RandomCrop, resized_crops
from nndefense.defenses.transforms.defended import (
    GridCropEnsemble,
    bit_depth_reduction,
    crop_ensemble,
    jpeg_compression,
    tv_minimization,
)
from nndefense.defenses.transforms.total_variation import TotalVariation, TvSolution, minimize_total_variation
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
